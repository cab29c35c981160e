"""A compiler sees one graph of every mixer and of every family that `fit` picks from, and it gives the same.

Run as a script it checks one group in a process of its own: a compiler cannot trace the checks that the tests put
around every function.
"""

import copy
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

Case = tuple[str, nn.Module, list[tuple[Tensor, ...]]]


def mixers() -> Iterator[Case]:
    sys.path.append(str(Path(__file__).parent / "mixers"))
    from test_contract import EVERY, build, tokens

    for name, axes in EVERY:
        yield f"{name}, {axes} axes", build(name, axes), [(tokens(axes),)]


def families() -> Iterator[Case]:
    from gossamer.data import read_dataset
    from gossamer.fit.candidates import enumerate_candidates
    from gossamer.tasks import create_task

    for source in ("toy-images", "toy-text", "toy-series"):
        data = read_dataset(source)
        task = create_task(data.task, data.spec, data.meta)
        inputs, _ = task.batch(data.train, torch.tensor([0, 1]))
        for candidate in enumerate_candidates(data):
            if candidate.name.endswith("-xs"):
                yield f"{candidate.name}, {source}", candidate.build(), [tuple(inputs)]


def sizes() -> Iterator[Case]:
    """What depends on the size alone is in the graph of each size as it is."""
    from gossamer.models import create_model

    images = [(torch.randn(2, 3, *size),) for size in ((64, 64), (64, 96))]
    swin = {"embed_dim": 8, "depths": (2, 2), "heads": (1, 2), "window": 4, "pad": True}
    yield "swin", create_model("swin", **swin), images
    yield "sret", create_model("sret", base_dim=8, heads=(1, 2, 4), depths=(2, 2, 2), img_size=64), images
    dct = {"backbone": ("basic", (1, 1, 1, 1)), "width": 8, "pixels": True}
    yield "dct-learning", create_model("resnet50_dct24", **dct), images


def learners() -> Iterator[Case]:
    """Systems of convolutions, pools, batch norms and wide products."""
    from gossamer.models import create_model

    image = [(torch.randn(8, 3, 64, 64),)]
    maps = {"depths": (1, 1, 1, 1), "dims": (32, 32, 48, 64)}
    yield "metaformer", create_model("metaformer", **maps), image
    yield "convnext", create_model("convnext", **maps), image
    yield (
        "efficientformer",
        create_model("efficientformer_l1", widths=(32, 32, 48, 64), depths=(1, 1, 1, 2), img_size=64),
        image,
    )
    pvt = {"heads": (1, 1, 2, 2), "mlp_ratios": (4, 4, 4, 4), "v2": True}
    yield "pvt", create_model("pvt", **maps, **pvt), image


class Products(nn.Module):
    """Convolutions of several kinds, and attention of a few tokens."""

    def __init__(self) -> None:
        from gossamer.layers.conv import Conv2d

        super().__init__()
        self.convs = nn.ModuleList(
            [
                Conv2d(6, 8, 3, padding=1),
                Conv2d(6, 6, (5, 3), padding=(2, 1), groups=6),
                Conv2d(6, 4, 2, stride=2, groups=2, bias=False),
                Conv2d(6, 8, 3, stride=(2, 1), padding=2, dilation=2, bias=False),
                Conv2d(6, 6, 7, padding=3, groups=6),
                Conv2d(6, 4, 1),
            ]
        )

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        from gossamer.ops.attention import attention, split_heads

        q, k, v = (split_heads(t.flatten(2).transpose(1, 2), 2) for t in (image, 2 * image, image + 1))
        return *(conv(image) for conv in self.convs), attention(q, k, v, bias=q[..., :1])


def products() -> Iterator[Case]:
    """What is called otherwise without gradients, by the compiler that users have."""
    from gossamer.layers.conv import hold_channels_last

    channels_last = torch.randn(2, 9, 7, 6).movedim(-1, 1)
    channels_first = torch.randn(1, 6, 5, 8)
    one = torch.randn(1, 9, 7, 6).movedim(-1, 1)
    any_stride = one.as_strided(one.shape, (1, *one.stride()[1:]))
    for held in (False, True):
        model = Products()
        if held:
            hold_channels_last(model)
        yield f"products, held {held}", model, [(channels_last,), (channels_first,), (any_stride,)]


GROUPS: dict[str, Callable[[], Iterator[Case]]] = {
    "mixers": mixers,
    "families": families,
    "sizes": sizes,
    "learners": learners,
    "products": products,
}


LEAST = {"mixers": 100, "families": 30, "sizes": 3, "learners": 4, "products": 2}


@pytest.mark.parametrize("group", GROUPS)
def test_a_compiler_sees_one_graph_that_gives_the_same(group: str) -> None:
    done = subprocess.run([sys.executable, __file__, group], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert int(done.stdout.splitlines()[-1]) >= LEAST[group]


def check(group: str) -> int:
    torch.manual_seed(0)
    count = failed = 0
    for name, model, calls in GROUPS[group]():
        torch.compiler.reset()
        # Tracing is enough for most, and quick; the others go on to the graphs that are compiled.
        backend = {"mixers": "eager", "families": "eager", "products": "inductor"}.get(group, "aot_eager")
        compiled = torch.compile(model.eval(), backend=backend, fullgraph=True)
        try:
            for call in calls:
                with torch.no_grad():
                    torch.testing.assert_close(compiled(*call), model(*call), rtol=1e-4, atol=1e-5)
                if group == "learners":
                    assert_own_products(model, call)
                    compare_gradients(model, call)
        except Exception as error:  # all of them are wanted, whatever the compiler raises
            failed += 1
            print(f"{name}: {type(error).__name__}: {str(error)[:400]}")
        count += 1
    print(count)
    return failed


def assert_own_products(model: nn.Module, call: tuple[Tensor, ...]) -> None:
    """The library's convolutions, of which a compiler would turn the maps, are not in the graph; ours are."""
    targets: set[object] = set()

    def backend(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        targets.update(node.target for node in graph.graph.nodes)
        return graph

    without_gradient = {torch.ops.mkldnn._convolution_pointwise.default, torch.ops.gossamer.linear.default}
    for grad, ours in ((False, without_gradient), (True, {torch.ops.gossamer.conv2d.default})):
        targets.clear()
        with torch.set_grad_enabled(grad):
            torch.compile(model, backend=backend, fullgraph=True)(*call)
        assert torch.conv2d not in targets, "conv2d of the library"
        assert ours <= targets, f"missing {ours - targets}"


def compare_gradients(model: nn.Module, call: tuple[Tensor, ...]) -> None:
    found = []
    state = copy.deepcopy(model.state_dict())
    for run in (model.train(), torch.compile(model, backend="aot_eager", fullgraph=True)):
        torch.manual_seed(0)
        model.load_state_dict(state)
        model.zero_grad()
        y = run(*call)
        outputs = y if isinstance(y, tuple) else (y,)
        sum(o.square().sum() for o in outputs).backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, rtol=1e-3, atol=1e-3 * float(grad.abs().max()) + 1e-6)
    model.eval()


if __name__ == "__main__":
    sys.exit(check(sys.argv[1]))
