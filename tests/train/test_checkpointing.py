"""Gradient checkpointing: the same gradients from less that is kept."""

import copy
import weakref

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from gossamer.data import read_dataset
from gossamer.layers import Block, Mlp
from gossamer.layers.norms import BatchNorm, ProgressiveRepBatchNorm
from gossamer.mixers import create_mixer
from gossamer.models import create_model
from gossamer.tasks import create_task
from gossamer.train import Settings, Trainer
from gossamer.trunks import Isotropic
from gossamer.trunks.checkpointing import runs, set_checkpointing

SMALL = dict(img_size=(16, 16), in_chans=1, num_classes=5)


class Live(TorchDispatchMode):
    """Bytes of tensors that operations made and that are still there; the most there were."""

    def __init__(self):
        super().__init__()
        self.users: dict[int, int] = {}
        self.now = self.most = 0

    def __torch_dispatch__(self, call, types, args=(), kwargs=None):
        answer = call(*args, **(kwargs or {}))
        for t in answer if isinstance(answer, (tuple, list)) else (answer,):
            if isinstance(t, torch.Tensor):
                self._watch(t)
        return answer

    def _watch(self, t):
        storage = t.untyped_storage()
        place, size = storage.data_ptr(), storage.nbytes()
        if place not in self.users:
            self.users[place] = 0
            self.now += size
            self.most = max(self.most, self.now)
        self.users[place] += 1

        def gone():
            self.users[place] -= 1
            if not self.users[place]:
                del self.users[place]
                self.now -= size

        weakref.finalize(t, gone)


def most_bytes(net, x):
    """The most bytes of activations there are at once in a forward and a backward pass."""
    weights = [p for p in net.parameters() if p.requires_grad]
    for p in weights:
        p.grad = torch.zeros_like(p)
    with Live() as live:
        net(x).square().sum().backward()
    return live.most


def vit(depth=4, **sizes):
    torch.manual_seed(0)
    return create_model("vit_tiny_patch16_224", patch=2, dim=32, depth=depth, heads=4, **{**SMALL, **sizes})


def swin(**sizes):
    torch.manual_seed(0)
    net = dict(embed_dim=16, depths=(4, 4), heads=(2, 4), patch=1, window=4, drop_path=0.3)
    return create_model("swin_t", **{**net, **SMALL, **sizes})


def gpt2():
    torch.manual_seed(0)
    return create_model("gpt2", dim=32, depth=5, heads=4, vocab_size=20, max_len=12, drop=0.3)


def bert():
    torch.manual_seed(0)
    return create_model("bert_base", dim=32, depth=5, heads=4, vocab_size=20, max_len=12, num_classes=3, drop=0.3)


def normed():
    """Blocks with batch norms, and with norms that count their steps."""
    net = vit()
    made = [
        Block(32, create_mixer("pool", 32), Mlp(32, 64), norm=norm)
        for norm in (BatchNorm, ProgressiveRepBatchNorm, BatchNorm, BatchNorm)
    ]
    return Isotropic(net.stem, made, norm=BatchNorm(32), head=net.head)


@pytest.mark.parametrize("make", [vit, swin, gpt2, bert, normed])
def test_gradients_and_statistics_are_identical(make):
    net = make().train()
    if make in (gpt2, bert):
        x = torch.randint(1, 20, (3, 12))
        x[1, 5:] = 0
    else:
        x = torch.randn(2, 1, 16, 16)
    other = copy.deepcopy(net)
    set_checkpointing(other)
    calls = []
    for part in (net, other):
        block = part.blocks[0] if hasattr(part, "blocks") else part.stages[0][0]
        count = []
        block.register_forward_hook(lambda *_, count=count: count.append(1))
        calls.append(count)
        torch.manual_seed(3)
        answer = part(x)
        (answer if isinstance(answer, torch.Tensor) else torch.stack(answer)).square().sum().backward()
    assert [len(c) for c in calls] == [1, 2]  # once more, when it is due
    for (name, a), b in zip(net.named_parameters(), other.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        assert a.grad is None or torch.equal(a.grad, b.grad), name
    for (name, a), b in zip(net.named_buffers(), other.buffers(), strict=True):
        assert torch.equal(a, b), name
    set_checkpointing(other, on=False)
    other(x)
    assert len(calls[1]) == 3


def test_what_is_kept_grows_with_the_root_of_depth():
    x = torch.randn(8, 1, 16, 16)
    plain = {depth: most_bytes(vit(depth), x) for depth in (4, 16, 36)}
    thin = {}
    for depth in plain:
        net = vit(depth)
        set_checkpointing(net)
        thin[depth] = most_bytes(net, x)
    # Depth 36 has nine times the blocks of depth 4, and three times as many runs of three times as many blocks.
    assert plain[36] > 7 * plain[4]
    assert thin[36] < 3.5 * thin[4]
    assert thin[36] < 0.35 * plain[36]
    assert thin[16] < 0.5 * plain[16]


@pytest.mark.parametrize("depth", range(20))
def test_runs_cover_all_blocks_once_and_are_about_the_root_of_them(depth):
    found = runs(depth)
    assert [i for a, b in found for i in range(a, b)] == list(range(depth))
    assert len(found) == round(depth**0.5)
    lengths = [b - a for a, b in found]
    assert not lengths or max(lengths) - min(lengths) <= 1


def test_nothing_is_made_again_in_eval_mode_and_models_without_trunks_say_so():
    net = vit().eval()
    set_checkpointing(net)
    count = []
    net.blocks[0].register_forward_hook(lambda *_: count.append(1))
    net(torch.randn(1, 1, 16, 16)).sum().backward()
    assert len(count) == 1
    with pytest.raises(ValueError, match="checkpointing needs a trunk"):
        set_checkpointing(nn.Linear(2, 2))


def test_a_trainer_that_is_told_to_follows_the_same_loss_curve():
    data = read_dataset("digits")
    task = create_task(data.task, data.spec, data.meta)
    losses, calls = {}, {}
    for on in (False, True):
        net = vit(img_size=(8, 8), num_classes=10, drop_path=0.2)
        count = []
        net.blocks[0].register_forward_hook(lambda *_, count=count: count.append(1))
        settings = Settings(batch_size=32, precision="float32", ema=0.0, checkpointing=on)
        trainer = Trainer(net, task, data, settings)
        losses[on] = []
        trainer.train(steps=6, on_step=losses[on].append)
        calls[on] = len(count)
    assert losses[True] == losses[False]
    assert (calls[False], calls[True]) == (6, 12)
