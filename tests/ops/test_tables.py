"""The table that stands for lists of tensors: right where it is made, refused where it must not be,
same results.
"""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import sfron_fast as sf
from sfron_fast import functional
from sfron_fast.ops import native, reference
from sfron_fast.ops import registry as ops
from sfron_fast.ops.tables import gather, table_of

pytestmark = pytest.mark.skipif(not native.available(), reason="needs the native kernels")


def describe(*lists):
    """The rows of each list, or None."""
    table = torch.empty(native.table_words(lists), dtype=torch.int64)
    if not native.describe(table, lists):
        return None
    counts, words = table[: len(lists)].tolist(), table[len(lists) :].view(-1, native.ROW_WORDS)
    return [part.tolist() for part in words.split(counts)]


def test_every_property_by_hand():
    parameter, transposed = nn.Parameter(torch.randn(3, 5)), torch.randn(4, 6).t()
    empty, scalar = torch.randn(0, 2), torch.tensor(2)
    [first, second] = describe([parameter, transposed], [empty, scalar[None]])
    for tensor, words in zip(
        [parameter, transposed, empty, scalar[None]], first + second, strict=True
    ):
        data, numel, dim, _, code_and_device, index_and_contiguous = words
        assert (data, numel, dim) == (tensor.data_ptr(), tensor.numel(), tensor.dim())
        # the CPU's device code is 0
        assert code_and_device == {torch.float32: 6, torch.int64: 4}[tensor.dtype]
        assert index_and_contiguous == int(tensor.is_contiguous()) << 32
    view = torch.randn(10)[3:7]  # a storage offset belongs to the pointer
    assert describe([view])[0][0][0] == view.data_ptr()
    assert describe([], []) == [[], []]


def test_contiguity_is_torchs():
    shapes = [(2, 3, 4), (1, 5), (5, 1), (0, 3), (1, 1, 1), (2, 1, 3)]
    tensors = [
        torch.randn(s).permute(p)
        for s in shapes
        for p in ([*range(len(s))], [*reversed(range(len(s)))])
    ]
    tensors += [torch.randn(6)[::2], torch.randn(1)[::2], torch.randn(1).expand(4)]
    tensors += [torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)]
    [rows] = describe(tensors)
    assert [bool(r[5] >> 32) for r in rows] == [t.is_contiguous() for t in tensors]


class Subclass(torch.Tensor):
    pass


def strangers():
    z = torch.randn(4, dtype=torch.complex64)
    yield "none", None
    yield "number", 1.0
    yield "subclass", torch.randn(3).as_subclass(Subclass)
    yield "complex", z
    yield "bool", torch.ones(3, dtype=torch.bool)
    yield "sparse", torch.ones(2, 2).to_sparse()
    yield "meta", torch.ones(2, device="meta")
    yield "uninitialised", nn.UninitializedParameter()
    yield "negated", z[0].conj().imag
    with FakeTensorMode():
        yield "fake", torch.ones(2)


@pytest.mark.parametrize("stranger", [pytest.param(s, id=name) for name, s in strangers()])
def test_strangers_are_not_described(stranger):
    assert describe([torch.ones(2), stranger]) is None


def test_a_short_table_is_refused():
    with pytest.raises(ValueError, match="table: expected a table with room"):
        native.describe(torch.empty(7, dtype=torch.int64), ([torch.ones(1), torch.ones(1)],))
    table = torch.tensor([5, 5, 0, 0], dtype=torch.int64)  # says ten tensors and holds none
    for wrong in (table, torch.zeros(1, dtype=torch.int64), torch.zeros(8)):
        with pytest.raises(ValueError, match="table"):
            torch.ops.sfron_fast.interpolate_.table(wrong, 0.5)


def gathered(params, tables):
    """Parameters, gradients and the rows of both, as ``gather`` finds them; None if it does not."""
    *found, tabled = gather(params, tables, 0)
    if not tabled:
        assert found[0] is params
        return None
    return *found, [tensors.table.view(-1, native.ROW_WORDS).tolist() for tensors in found]


def with_gradients(*shapes):
    params = [nn.Parameter(torch.randn(s)) for s in shapes]
    for p in params:
        p.grad = torch.randn_like(p)
    return params


def test_parameters_and_gradients_are_gathered():
    params, tables = with_gradients((3, 5), (), (0,), (64,)), {}
    for _ in range(2):
        found, grads, rows = gathered(params, tables)
        assert all(a is b for a, b in zip(found, params, strict=True))
        assert all(g is p.grad for g, p in zip(grads, params, strict=True))
        assert rows == describe(params, grads) == describe(found, grads)
        params[0].grad = torch.randn(3, 5)  # another place each time
        params[3].data = torch.randn(64)
    assert gathered([], {})[2] == [[], []]


def test_a_wrong_hint_is_only_a_hint():
    params, tables = with_gradients(*[(5,)] * 20), {0: torch.randint(-(2**63), 2**63 - 1, (2, 120))}
    _, grads, rows = gathered(params, tables)
    assert rows == describe(params, grads)
    del params[-1]  # fewer than the table has room for
    _, grads, rows = gathered(params, tables)
    assert rows == describe(params, grads)


@pytest.mark.parametrize(
    "stranger", [None, torch.randn(3).as_subclass(Subclass), torch.ones(3).to_sparse()]
)
def test_strangers_are_not_gathered(stranger):
    params = with_gradients((3,), (3,))
    params[1].grad = stranger
    assert gathered(params, {}) is None
    assert gather(params, {}, 0)[1][1] is stranger
    assert gathered([params[0], nn.Buffer(torch.ones(3).as_subclass(Subclass))], {}) is None


def test_gathering_looks_before_it_writes():
    short = torch.empty(2, 5, dtype=torch.int64).unbind()
    with pytest.raises(ValueError, match="table: expected tables with room"):
        native.gather(with_gradients((2,)), short)
    assert native.gather([object()], torch.empty(2, 6, dtype=torch.int64).unbind()) is None
    with pytest.raises(AttributeError):
        gather([object()], {}, 0)


class Shortens(TorchFunctionMode):
    """Other code that runs while a gradient is looked up, and empties the list."""

    def __init__(self, params):
        super().__init__()
        self.params = params

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.params.clear()
        return func(*args, **(kwargs or {}))


def test_a_list_that_is_shortened_meanwhile():
    params, tables = with_gradients((2,), (2,)), torch.zeros(2, 12, dtype=torch.int64).unbind()
    with Shortens(params), pytest.raises(IndexError):
        native.gather(params, tables)


@pytest.mark.parametrize("make", [sf.SFRonSGD, sf.SFRonAdamW])
def test_tensors_that_move_between_steps_are_found(make, monkeypatch):
    """Groups of equal lengths share no table, and no step believes the last one's."""
    runs = []
    for compiled in (True, False):
        torch.manual_seed(0)
        params = with_gradients(*[(3,)] * 4)
        optimizer = make(
            [{"params": params[:2]}, {"params": params[2:]}], lr=0.1, max_norm=1.0, slow_lr=0.5
        )
        monkeypatch.setattr(
            native, "gather", native.gather if compiled else lambda params, tables: None
        )
        optimizer.forget_step()
        for p in params:
            p.data, p.grad = p.data.clone(), torch.randn(3)
        optimizer.step()
        runs.append(params)
    assert all(map(torch.equal, *runs))


class Lists(TorchDispatchMode):
    """The names of all that is called."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_mode_sees_no_table():
    params, tables = with_gradients((3,), (2, 2)), {}
    with Lists() as mode:
        assert gathered(params, tables) is None
        gather(params, tables, 0)
    assert not mode.seen
    assert not tables  # it would be one of the mode's, a FakeTensor for instance, for ever
    assert gathered(params, tables) is not None


def test_transforms_and_modes_see_the_tensors():
    seen = []

    def under(x):
        seen.append(table_of([[x]]))
        return x * 1.0

    torch.vmap(under)(torch.ones(3, 2))
    torch.func.functionalize(under)(torch.ones(3))
    torch.func.grad(lambda x: under(x).sum())(torch.ones(3))
    with FakeTensorMode(allow_non_fake_inputs=True):
        under(torch.ones(3))
    assert seen == [None] * 4
    assert table_of([[torch.ones(3)]]) is not None


@pytest.mark.parametrize(
    ("one", "other"), [((), (1,)), ((1,), ()), ((5,), (5, 1)), ((5, 1), (5,)), ((2, 3), (3, 2))]
)
def test_shapes_of_equal_counts_differ(one, other):
    params = [torch.zeros(2), torch.zeros(one)]
    with pytest.raises(ValueError, match=r"grads\[1\]: expected shape .*found"):
        functional.sgd_step_(params, [torch.ones(2), torch.ones(other)], lr=1.0)
    assert not any(p.any() for p in params)


@pytest.mark.parametrize("learned", [True, False])
def test_a_negated_tensor_is_not_described(learned, monkeypatch):
    """Where the place of the bit is not known, each tensor is asked; more than five dimensions
    always are.
    """
    plain, keys = torch.empty(1), torch._C._dispatch_keys(torch.empty(1)).raw_repr()
    if not learned:
        assert not native._module.learn_keys(plain, keys, plain, keys)
    for shape in ((), (1,), (5,), (4, 3), (2,) * 5, (2,) * 6):
        negated = torch._neg_view(torch.randn(shape))
        assert describe([torch.randn(shape)]) is not None
        assert describe([negated]) is None
        assert describe([nn.Parameter(negated)]) is None
    ops._learn_keys()


def test_the_place_of_the_keys_is_learned():
    plain, negated = torch.empty(1), torch._neg_view(torch.empty(1))
    keys = [torch._C._dispatch_keys(t).raw_repr() for t in (plain, negated)]
    assert native._module.learn_keys(plain, keys[0], negated, keys[1])


def zeros(shape):
    """Without memory, as forward-mode derivatives are made of."""
    return torch._efficientzerotensor(shape)


def test_zero_tensors_are_zeros_where_they_are_read():
    assert describe([zeros(3)]) is None
    assert describe([zeros(0)]) is not None
    calls = {
        functional.masked_grad_norm: lambda x, z: functional.masked_grad_norm([z, x]),
        functional.sgd_step_: lambda x, z: functional.sgd_step_([x], [z], lr=0.1, weight_decay=0.5),
        functional.fisher_accumulate_: lambda x, z: functional.fisher_accumulate_([x], [z], 1.0),
        functional.saliency_mask: lambda x, z: functional.saliency_mask([x], [z], 1.0)[1],
    }
    for op, call in calls.items():
        found = []
        for make in (zeros, torch.zeros):
            x = torch.arange(6.0).view(2, 3)
            found.append((call(x, make((2, 3))), x))
        (result, x), (wanted, y) = found
        assert torch.equal(x, y), op
        assert result is wanted is None or torch.equal(result, wanted), op


def test_a_zero_tensor_is_not_written_to():
    slow = torch.ones(4)
    with pytest.raises(
        ValueError, match=r"fast\[1\]: expected a tensor to write to, found a zero tensor; clone it"
    ):
        functional.interpolate_([slow, torch.ones(3)], [torch.zeros(4), zeros(3)], 0.5)
    assert slow.eq(1).all()


@pytest.mark.parametrize("kind", [sf.SFRonSGD, sf.SFRonAdamW])
@pytest.mark.parametrize(
    "gradient", [zeros(3), torch._neg_view(torch.ones(3))], ids=["zero", "negated"]
)
def test_an_optimizer_reads_what_a_gradient_means(kind, gradient):
    weights = []
    for grad in (gradient, gradient + 0.0):
        p = nn.Parameter(torch.ones(3))
        p.grad = grad
        kind([p], lr=0.1, weight_decay=0.1).step()
        weights.append(p.detach())
    assert torch.equal(*weights)


@pytest.mark.parametrize("shape", [(), (1,), (5,), (4, 3)])
def test_a_lazily_negated_gradient_has_its_sign(shape):
    params = [torch.zeros(shape)]
    gradient = torch.randn(shape, dtype=torch.complex64).conj().imag
    assert gradient.is_neg()
    functional.sgd_step_(params, [gradient], lr=1.0)
    assert torch.equal(params[0], -(gradient + 0.0))


def test_same_results_as_through_handles():
    def arguments():
        torch.manual_seed(1)
        shapes = [(3, 5), (), (0,), (64,), (65,)]
        lists = [[torch.randn(s) for s in shapes] for _ in range(4)]
        steps = [torch.tensor(float(i)) for i in range(len(shapes))]
        masks = [reference.pack_bits(torch.randn(s) > 0) for s in shapes]
        lists[3] = [v.abs() for v in lists[3]]
        return [*lists, [], [], steps, [], [], [], [], [], masks]

    scalars = {
        "lr": 0.1,
        "beta1": 0.9,
        "beta2": 0.99,
        "eps": 1e-8,
        "weight_decay": 0.1,
        "decoupled": True,
        "maximize": False,
        "freeze_masked": False,
        "max_norm": 1.0,
        "slow_lr": 1.0,
    }
    one, two = arguments(), arguments()
    norm = functional.masked_grad_norm(one[1], one[-1])
    assert torch.equal(norm, ops.op("masked_grad_norm")(two[1], two[-1], None))
    ops.op("adamw_step_")(*two, norm, None, None, **scalars)
    table = table_of(one)
    torch.ops.sfron_fast.adamw_step_.table(table, norm, None, None, **scalars)
    for a, b in zip(one, two, strict=True):
        assert all(map(torch.equal, a, b))


def test_threads_share_no_table():
    """The interpreter goes on while a kernel runs; what the others describe meanwhile must not be
    what it reads.
    """

    def work(thread):
        sums, grads = (
            [torch.full((n,), v) for n in (thread + 1, 40_000)] for v in (0.0, 1.0 + thread)
        )
        for _ in range(200):
            functional.fisher_accumulate_(sums, grads, 1.0)
        return [s.unique().tolist() for s in sums]

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(work, range(4))) == [[[200.0 * (1 + t) ** 2]] * 2 for t in range(4)]


def test_a_table_serves_shorter_lists():
    long, short = [torch.zeros(3) for _ in range(50)], [torch.zeros(3)]
    for _ in range(2):
        for sums in (long, short):
            functional.fisher_accumulate_(sums, [torch.ones(3) for _ in sums], 1.0)
    assert all(torch.equal(s, torch.full((3,), 2.0)) for s in long + short)


@pytest.mark.parametrize("loaded", [True, False])
def test_same_objects(loaded, monkeypatch):
    if not loaded:
        monkeypatch.setattr(native, "_module", None)
    a, b, c = torch.ones(1), torch.ones(1), torch.ones(1)
    assert native.same([a, b], [a, b])
    assert not native.same([a, b], [a, c])  # equal, but another
    assert not native.same([a, b], [a])
    dicts = [{"x": a, "y": b}, {}, {"x": c}]
    assert native.same_values(dicts, [a, b, c])
    assert not native.same_values(dicts, [a, b])
    assert not native.same_values(dicts, [a, b, c, a])
    assert not native.same_values(dicts, [a, c, b])
