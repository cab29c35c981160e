"""What is checked once only is checked as strictly as at every call."""

from concurrent.futures import ThreadPoolExecutor

import beartype
import jaxtyping
import pytest
import torch
from jaxtyping import Float, TypeCheckError
from torch import Tensor

import shapes

CONF = beartype.BeartypeConf(is_pep484_tower=True)


def checked(fn):
    return shapes.once(fn, beartype.beartype(conf=CONF))


@checked
def padded(x: Float[Tensor, "b n"], size: int, wrong: list[float] | None = None) -> Float[Tensor, "b {size}"]:
    """`wrong` is read and has no part in the form of a call beyond its kinds."""
    more = 1 if wrong and wrong[0] > 0 else 0
    return torch.zeros(len(x), size + more)


def test_another_size_type_or_number_of_axes_is_found_after_a_right_call():
    x = torch.ones(2, 3)
    for _ in range(2):
        assert padded(x, 4).shape == (2, 4)
    for bad in (x[0], x[None], x.long(), x.numpy(), [1.0], None):
        for _ in range(2):
            with pytest.raises(TypeCheckError):
                padded(bad, 4)
    with pytest.raises(TypeCheckError):
        padded(x, "4")
    with pytest.raises(TypeError):
        padded(x)


def test_a_wrong_result_is_found_though_the_arguments_are_known():
    x, wrong = torch.ones(2, 3), [-1.0]
    assert padded(x, 5, wrong).shape == (2, 5)
    wrong[0] = 1.0
    for _ in range(2):
        with pytest.raises(TypeCheckError, match="return value"):
            padded(x, 5, wrong)
    wrong[0] = -1.0
    assert padded(x, 5, wrong).shape == (2, 5)


def test_sizes_that_must_be_alike_are_compared():
    @checked
    def product(a: Float[Tensor, "n k"], b: Float[Tensor, "k m"], *rest: int, **names: int) -> Float[Tensor, "n m"]:
        return a @ b if not names else (a @ b).T

    a, b = torch.ones(2, 3), torch.ones(3, 4)
    for _ in range(2):
        assert product(a, b).shape == (2, 4)
        with pytest.raises(TypeCheckError):
            product(a, b.T)
        with pytest.raises(TypeCheckError):
            product(a, b, turned=1)
        with pytest.raises(TypeCheckError):
            product(a, b, "word")


def test_long_lists_are_looked_at_each_time():
    @checked
    def first(words: list[str]) -> str:
        return words[0]

    assert first(["a"] * 100) == "a"
    with pytest.raises(TypeCheckError):
        first([1] * 100)


def test_other_containers_and_classes_are_looked_at():
    @checked
    def count(words: set[str], kind: type[torch.nn.Module]) -> int:
        return len(words)

    for _ in range(2):
        assert count({"a"}, torch.nn.Linear) == 1
        with pytest.raises(TypeCheckError):
            count({1}, torch.nn.Linear)
        with pytest.raises(TypeCheckError):
            count({"a"}, shapes.Hashable)


def test_a_size_read_from_an_object_is_compared_at_each_call():
    class Cut:
        size = 2

        @checked
        def cut(self, x: Float[Tensor, " n"]) -> Float[Tensor, " {self.size}"]:
            return x[:2]

    cut, x = Cut(), torch.ones(3)
    assert cut.cut(x).shape == (2,)
    cut.size = 3
    with pytest.raises(TypeCheckError, match="return value"):
        cut.cut(x)


def test_threads_do_not_take_each_others_results():
    @checked
    def of(size: int, results: list[Tensor]) -> Float[Tensor, "{size}"]:
        return results[0]

    def call(size: int) -> None:
        results = [torch.zeros(size)]
        for _ in range(200):
            assert of(size, results).shape == (size,)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(call, range(1, 5)))


def test_nothing_is_checked_where_checks_are_off(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    assert padded(torch.ones(2, 3).long(), 4).shape == (2, 4)


def test_the_library_is_checked_so():
    from gossamer.ops.attention import attention

    q = torch.ones(1, 2, 4, 8)
    assert attention(q, q, q).shape == q.shape
    with pytest.raises(TypeCheckError):
        attention(q[0], q, q)
