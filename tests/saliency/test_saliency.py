"""SaliencyMask: selection, bits, names, files."""

import copy
import hashlib
import json
import math
import os
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import build, loader, random_fishers, random_mask
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from sfron_fast import Fisher, SaliencyMask, SFRonSGD, estimate_fisher, estimate_mask
from sfron_fast.models.names import canonical_name, canonical_names, possible_names
from sfron_fast.ops.reference import pack_bits, unpack_bits
from sfron_fast.saliency import mask_file

SHAPES = {"a.weight": (5, 3), "a.bias": (5,), "scale": (), "empty": (0, 4), "b.weight": (4, 2, 3)}
ESTIMATORS = ("sample", "batch", "batch_equal")


# --- selection ------------------------------------------------------------------------------------


@pytest.mark.checklist("H3", "H5")
@pytest.mark.parametrize("threshold", [0.5, 1.0, 3.0])
def test_selection_is_the_authors_ratio(threshold):
    forget, retain = random_fishers(SHAPES)
    forget["a.bias"][:2], retain["a.bias"][:2] = 0.0, 0.0  # 0 / 0
    forget["b.weight"].view(-1)[:3] = retain["b.weight"].view(-1)[:3]  # ratio exactly 1
    mask = SaliencyMask.from_fisher(
        forget=forget, retain=retain, threshold=threshold, zero_over_zero=True
    )
    for name in SHAPES:
        expected = (forget[name] + 1e-15) / (retain[name] + 1e-15) >= threshold
        assert torch.equal(mask.to_bool(name), expected), name
        assert mask.counts()[name] == expected.sum()
    assert bool(mask.to_bool("a.bias")[:2].all()) == (threshold <= 1)
    assert bool(mask.to_bool("b.weight").view(-1)[:3].all()) == (threshold <= 1)


def test_zero_over_zero_is_not_selected():
    forget = {"w": torch.tensor([0.0, 0.0, 1e-30, 2.0, 0.0, 3.0, 3.0, 0.0, 0.0, 5.0])}
    retain = {"w": torch.tensor([0.0, 1.0, 0.0, 2.0, 0.0, 4.0, 1.0, 1e-30, 0.0, 0.0])}
    pair = {"forget": forget, "retain": retain}
    said = [0, 0, 1, 1, 0, 0, 1, 1, 0, 1]  # 1e-30 is not 0, though lost beside 1e-15
    assert SaliencyMask.from_fisher(**pair).to_bool("w").int().tolist() == said
    authors = [1, 0, 1, 1, 1, 0, 1, 1, 1, 1]
    theirs = SaliencyMask.from_fisher(**pair, zero_over_zero=True)
    assert theirs.to_bool("w").int().tolist() == authors
    assert SaliencyMask.from_fisher(**pair, threshold=0.5).counts() == {"w": 6}


class Adapted(nn.Module):
    """A linear layer with a fresh low-rank adapter: B is 0, so A has a gradient of exactly 0."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.base = nn.Linear(6, 4).requires_grad_(False)
        self.lora_A = nn.Parameter(torch.randn(2, 6))
        self.lora_B = nn.Parameter(torch.zeros(4, 2))

    def forward(self, x):
        return self.base(x) + x @ self.lora_A.T @ self.lora_B.T


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_fresh_adapter_is_selected_by_what_the_data_say(estimator):
    forget, retain = loader(9, 4), loader(9, 4, seed=1)
    model = Adapted()
    found = estimate_mask(model, forget=forget, retain=retain, estimator=estimator)
    assert found.counts()["lora_A"] == 0
    assert found.counts()["lora_B"] > 0
    theirs = estimate_mask(
        model, forget=forget, retain=retain, estimator=estimator, zero_over_zero=True
    )
    assert theirs.counts() == {"lora_A": 12, "lora_B": found.counts()["lora_B"]}


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_from_estimated_fishers(estimator):
    model = build("bn")
    fishers = [estimate_fisher(model, loader(9, 4, seed=s), estimator=estimator) for s in (1, 2)]
    mask = SaliencyMask.from_fisher(forget=fishers[0], retain=fishers[1])
    for name, p in model.named_parameters():
        assert torch.equal(mask.to_bool(name), fishers[0][name] + 1e-15 >= fishers[1][name] + 1e-15)
        assert mask.to_bool(name).shape == p.shape
    assert 0 < sum(mask.counts().values()) < sum(p.numel() for p in model.parameters())
    assert mask.metadata["forget"] == fishers[0].metadata
    assert mask.metadata["threshold"] == 1.0


@pytest.mark.checklist("H3")
@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=60),
    st.floats(0.001, 1.0),
    st.integers(1, 59),
)
@settings(max_examples=60, deadline=None)
def test_top_k_counts_are_exact_and_ties_go_to_the_lower_index(values, fraction, cut):
    flat = torch.tensor(values, dtype=torch.float32)
    parts = {n: t for n, t in (("x", flat[:cut]), ("y", flat[cut:]))}
    ones = {n: torch.ones_like(t) for n, t in parts.items()}
    mask = SaliencyMask.top_k(forget=parts, retain=ones, fraction=fraction)
    ratio = torch.cat([parts["x"], parts["y"]]).tolist()
    chosen = torch.cat([mask.to_bool("x"), mask.to_bool("y")]).tolist()
    order = sorted(range(len(ratio)), key=lambda i: (-ratio[i], i))[: round(fraction * len(ratio))]
    assert [i for i, c in enumerate(chosen) if c] == sorted(order)


def test_top_k_leaves_out_parameters_without_gradient():
    forget, retain = (
        Fisher({"a": torch.ones(8), "b": torch.zeros(8)}, {"no_gradient": ["b"]}),
        Fisher({"a": torch.full((8,), 4.0), "b": torch.zeros(8)}, {"no_gradient": ["b"]}),
    )
    # though b's ratio, 1, is larger
    assert SaliencyMask.top_k(forget=forget, retain=retain, fraction=0.5).counts() == {
        "a": 8,
        "b": 0,
    }
    assert SaliencyMask.from_fisher(forget=forget, retain=retain).counts() == {"a": 0, "b": 0}


# --- bits -----------------------------------------------------------------------------------------


@pytest.mark.checklist("H2")
@given(st.lists(st.booleans(), max_size=70))
@settings(max_examples=80, deadline=None)
def test_packing_is_exact_for_every_size(values):
    selected = torch.tensor(values, dtype=torch.bool)
    packed = pack_bits(selected)
    assert packed.dtype == torch.uint8
    assert packed.shape == (math.ceil(len(values) / 8),)
    assert packed.tolist() == [
        sum(bit << i for i, bit in enumerate(values[8 * byte : 8 * byte + 8]))
        for byte in range(len(packed))
    ]
    assert torch.equal(unpack_bits(packed, (len(values),)), selected)
    mask = SaliencyMask.from_bool({"w": selected})
    assert mask.counts() == {"w": sum(values)}
    assert torch.equal(mask.to_bool("w"), selected)
    assert SaliencyMask.from_bool({"w": selected.float()}) == mask


def test_bits_follow_logical_order_whatever_the_strides():
    selected = torch.rand(3, 5, 4, 2, generator=torch.Generator().manual_seed(0)) < 0.5
    expected = SaliencyMask.from_bool({"w": selected})
    assert SaliencyMask.from_bool({"w": selected.to(memory_format=torch.channels_last)}) == expected
    forget = {"w": selected.float().to(memory_format=torch.channels_last)}
    mask = SaliencyMask.from_fisher(forget=forget, retain={"w": torch.full((3, 5, 4, 2), 0.5)})
    assert torch.equal(mask.to_bool("w"), selected)


@pytest.mark.checklist("H1")
def test_counts_density_and_summary():
    mask = SaliencyMask.from_bool(
        {"a": torch.tensor([1, 0, 0, 1]), "bb": torch.ones(2, 3), "none": torch.ones(0)}
    )
    assert mask.counts() == {"a": 2, "bb": 6, "none": 0}
    assert mask.density() == {"a": 0.5, "bb": 1.0, "none": 0.0}
    lines = mask.summary().splitlines()
    assert lines[1].split() == ["a", "4", "2", "50.00%"]
    assert lines[-1].split() == ["total", "10", "8", "80.00%"]
    assert len({len(line) for line in lines}) == 1


# --- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "_orig_mod.module."])
def test_masks_travel_between_wrapped_and_plain_models(prefix):
    model = build()
    mask = random_mask(model)
    wrapped = [(prefix + n, p) for n, p in model.named_parameters()]
    from_wrapped = SaliencyMask.from_bool({prefix + n: mask.to_bool(n) for n in mask})
    assert from_wrapped == mask
    plain = mask.resolve(model.named_parameters())
    assert all(torch.equal(a, b) for a, b in zip(plain, mask.resolve(wrapped), strict=True))
    assert all(
        torch.equal(a, b)
        for a, b in zip(plain, from_wrapped.resolve(model.named_parameters()), strict=True)
    )
    inner = [("block._checkpoint_wrapped_module.weight", nn.Parameter(torch.ones(3)))]
    SaliencyMask.from_bool({"block.weight": torch.ones(3)}).resolve(inner)


def test_names_that_only_a_wrapper_tells_apart_are_refused():
    with pytest.raises(ValueError, match="bits: expected names that differ"):
        SaliencyMask.from_bool({"a._orig_mod.w": torch.ones(3), "a.w": torch.zeros(3)})


class Own(nn.Module):
    """A weight of its own beside that of a module under a name that wrappers use too."""

    def __init__(self, name):
        super().__init__()
        self.weight, self.inner = nn.Parameter(torch.ones(4, 4)), name
        setattr(self, name, nn.Linear(4, 4))

    def forward(self, x):
        return getattr(self, self.inner)(x) + x @ self.weight.t()


@pytest.mark.checklist("H1", "E6")
@pytest.mark.parametrize("name", ["module", "base_layer"])
def test_a_models_own_names_are_no_wrappers(name, tmp_path):
    """The two weights are of one shape, so that a mix-up would not show otherwise; masks travel all
    the same.
    """
    model = nn.Sequential(Own(name), nn.Linear(4, 4))
    batches = [(torch.randn(6, 4), torch.randint(4, (6,))) for _ in range(2)]
    estimate_mask(model, forget=batches[:1], retain=batches[1:])  # can be made
    chosen = {n: torch.rand(p.shape) < 0.5 for n, p in model.named_parameters()}
    mask = SaliencyMask.from_bool(chosen)
    for wrap in (lambda m: m, nn.DataParallel, lambda m: nn.DataParallel(nn.DataParallel(m))):
        wrapped = list(wrap(model).named_parameters())
        assert mask.coverage(wrapped) == {
            "matched": [n for n, _ in wrapped],
            "unmatched": [],
            "unused": [],
        }
        found = dict(zip(chosen, mask.resolve(wrapped), strict=True))
        there = SaliencyMask.from_bool(
            {n: chosen[m] for (n, _), m in zip(wrapped, chosen, strict=True)}
        )
        assert there == mask
        for n in chosen:
            assert torch.equal(unpack_bits(found[n], chosen[n].shape), chosen[n])
    mask.save(tmp_path / "mask")
    again = SaliencyMask.load(tmp_path / "mask")
    assert all(torch.equal(again.to_bool(n), c) for n, c in chosen.items())
    # of another model: serves one of the two
    one = SaliencyMask.from_bool({"0.weight": chosen["0.weight"]})
    assert one.coverage(model.named_parameters())["unmatched"] == [
        n for n in chosen if n != "0.weight"
    ]


def test_names_behind_several_wrappers():
    name = "module.base_model.model.0.base_layer.weight"
    assert canonical_name(name) == list(possible_names(name))[-1] == "0.weight"
    assert list(possible_names(name))[:2] == [name, name.removeprefix("module.")]
    assert len(list(possible_names("module." * 40 + "weight"))) == 2
    root = "module.base_model.model."
    assert canonical_names([root + "a.module.w", root + "a.w"]) == ["a.module.w", "a.w"]
    assert canonical_name("module") == "module"  # a parameter is nobody's wrapper


@pytest.mark.checklist("H1")
def test_wrong_model_is_refused():
    mask = random_mask(build("bn"))
    with pytest.raises(ValueError, match=r"found none for 1 \(head.weight\)"):
        mask.resolve(
            [*build("bn").named_parameters(), ("head.weight", nn.Parameter(torch.ones(2)))]
        )
    narrow = nn.Sequential(nn.Linear(6, 10), nn.BatchNorm1d(10), nn.Tanh(), nn.Linear(10, 3))
    with pytest.raises(
        ValueError, match=r"saliency\['3.weight'\]: expected shape \(3, 10\), found \(4, 10\)"
    ):
        SFRonSGD(narrow.named_parameters(), saliency=mask)


def test_digest_is_over_names_shapes_and_bits():
    base = {"a": torch.tensor([1, 0, 1]), "b": torch.ones(2, 3)}
    mask = SaliencyMask.from_bool(base)
    assert mask == SaliencyMask.from_bool(dict(reversed(base.items())), {"threshold": 5})
    others = [
        {**base, "a": torch.tensor([1, 0, 0])},
        {"a": base["a"], "c": base["b"]},
        {**base, "b": torch.ones(3, 2)},
        {"a": base["a"]},
        {**base, "a": torch.tensor([1, 0, 1, 0])},
    ]
    digests = {SaliencyMask.from_bool(o).digest() for o in others} | {mask.digest()}
    assert len(digests) == 6
    with pytest.raises(TypeError):
        hash(mask)


# --- files ----------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    forget, retain = random_fishers(SHAPES)
    for fisher in (forget, retain):
        fisher.metadata.update(
            {"estimator": "sample", "samples": 7, "model": "0" * 64, "batch_size": 4}
        )
    mask = SaliencyMask.from_fisher(forget=forget, retain=retain, threshold=1.5)
    mask.save(tmp_path / "mask.safetensors")
    return mask, tmp_path / "mask.safetensors"


def test_file_round_trip_with_provenance(saved):
    mask, path = saved
    again = SaliencyMask.load(str(path))
    assert again == mask
    assert again.shapes == mask.shapes
    assert again.metadata == mask.metadata
    assert again.metadata["threshold"] == 1.5
    assert again.metadata["retain"]["samples"] == 7
    assert all(torch.equal(again.to_bool(n), mask.to_bool(n)) for n in SHAPES)


@pytest.mark.checklist("H2")
def test_file_is_one_bit_a_weight_and_a_header(saved):
    mask, path = saved
    header = int.from_bytes(path.read_bytes()[:8], "little")
    assert path.stat().st_size == 8 + header + sum(
        math.ceil(math.prod(s) / 8) for s in SHAPES.values()
    )
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["digest"] == mask.digest()
        assert json.loads(file.metadata()["provenance"])["forget"]["estimator"] == "sample"


def load_or_none(path):
    try:
        return SaliencyMask.load(path)
    except ValueError:
        return None


def test_no_byte_can_change_unnoticed(saved):
    mask, path = saved
    whole = path.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    telling = [whole.index(b) for b in (b"1.5", b"sample", mask.digest()[:9].encode())] + list(
        range(start, len(whole))
    )
    for position in [*telling, *range(0, start, 7)]:
        broken = bytearray(whole)
        broken[position] ^= 1
        path.write_bytes(broken)
        found = load_or_none(path)
        # json's own freedom
        unchanged = found is not None and found == mask and found.metadata == mask.metadata
        assert found is None or (unchanged and position not in telling), position
    path.write_bytes(whole)
    assert SaliencyMask.load(path) == mask


def test_truncated_and_foreign_files_are_refused(saved, tmp_path):
    _, path = saved
    whole = path.read_bytes()
    for length in (0, 4, 8, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="path: expected a whole mask file"):
            SaliencyMask.load(path)
    path.write_bytes(whole + b"x")
    with pytest.raises(ValueError, match="path"):
        SaliencyMask.load(path)
    with pytest.raises(FileNotFoundError, match="path"):
        SaliencyMask.load(tmp_path / "nothing")
    save_file({"w": torch.ones(3)}, path)
    with pytest.raises(ValueError, match=r"sfron_fast.saliency_mask.v1"):
        SaliencyMask.load(path)


DEEP, LONG = "[" * 100_000 + "]" * 100_000, "9" * 5000
HOSTILE = {
    "shapes": [
        "[]",
        "null",
        "{",
        DEEP,
        *(
            f'{{"w": {shape}}}'
            for shape in (
                "[Infinity]",
                "[NaN]",
                "[-2, -2]",
                "[4.0]",
                "[true, 4]",
                "4",
                '["4"]',
                "[0, 1e400]",
                f"[{LONG}]",
                f"[0, {2**70}]",
                DEEP,
            )
        ),
    ],
    "provenance": [DEEP, "5", "[]", '"text"', "{", ""],
    "digest": ["", "0" * 64],
    "format": ["", "sfron_fast.saliency_mask.v2"],
}


@pytest.mark.parametrize("key", HOSTILE)
def test_a_hostile_header_is_a_value_error(key, tmp_path):
    """Written by somebody who knows the format: checksums that fit, values that json or torch choke
    on.
    """
    good = SaliencyMask.from_bool({"w": torch.ones(4)})
    good.save(path := tmp_path / "mask")
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    for value in HOSTILE[key]:
        changed = {**header, key: value}
        if key == "provenance":
            changed["provenance_digest"] = hashlib.sha256(value.encode()).hexdigest()
        if key == "shapes" and value[1:].startswith('"w": [') and len(value) < 100:
            over = f"w{json.loads(value)['w']}".encode() + bytes(good["w"].tolist())
            changed["digest"] = hashlib.sha256(over).hexdigest()
        save_file({"w": good["w"].clone()}, path, changed)
        with pytest.raises(ValueError, match="path: expected a"):
            SaliencyMask.load(path)
    save_file({"w": good["w"].clone()}, path, header)
    assert SaliencyMask.load(path) == good


class Bomb:
    def __reduce__(self):
        return os.system, ("touch exploded",)


@pytest.mark.parametrize("write", [pickle.dump, torch.save])
def test_pickles_are_refused_and_never_run(write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with open("mask.pt", "wb") as file:
        write({"w": Bomb()}, file)
    with pytest.raises(ValueError, match="path: expected a whole mask file"):
        SaliencyMask.load("mask.pt")
    assert not (tmp_path / "exploded").exists()


def test_saving_makes_the_folder_and_does_not_take_its_place(saved, tmp_path):
    mask, _ = saved
    mask.save(tmp_path / "new" / "mask.safetensors")
    assert SaliencyMask.load(tmp_path / "new" / "mask.safetensors") == mask
    with pytest.raises(ValueError, match="path: expected a file's, found a folder at"):
        mask.save(tmp_path / "new")


def test_saving_is_whole_or_not_at_all(saved, monkeypatch):
    mask, path = saved
    whole = path.read_bytes()

    def dies(*args, **kwargs):
        raise OSError("disk full")

    other = SaliencyMask.from_bool({"w": torch.ones(3)})
    for module, name in ((os, "replace"), (mask_file, "save_file")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, dies)
            with pytest.raises(OSError, match="disk full"):
                other.save(path)
        assert path.read_bytes() == whole
        assert [p.name for p in path.parent.iterdir()] == [path.name]
    with pytest.raises(TypeError):
        SaliencyMask.from_bool({"w": torch.ones(3)}, {"no": object()}).save(path)
    assert path.read_bytes() == whole
    other.save(path)
    assert SaliencyMask.load(path) == other
    assert SaliencyMask.load(path) != mask


def test_entries_that_share_memory_and_edits(tmp_path):
    """Saved by value; an edit of one entry changes that one, wherever the mask goes."""
    ones = torch.full((3,), 255, dtype=torch.uint8)
    with torch.inference_mode():
        mask = SaliencyMask(
            {"a": ones[:2], "b": ones[:2], "c": ones[1:]}, {"a": (4, 4), "b": (16,), "c": (2, 8)}
        )
    mask.save(tmp_path / "mask")
    assert SaliencyMask.load(tmp_path / "mask") == mask
    before = mask.version
    mask["b"].zero_()
    assert mask.version != before
    assert mask.counts() == {"a": 16, "b": 0, "c": 16}
    assert bool((ones == 255).all())
    for twin in (copy.deepcopy(mask), pickle.loads(pickle.dumps(mask))):
        assert twin == mask
        assert twin.metadata == mask.metadata
        before = twin.version
        twin["a"].zero_()
        assert twin.version != before
        assert mask.counts()["a"] == 16
    many = {f"w{i}": torch.ones(800) for i in range(50)}
    # not every entry with the memory of all
    assert len(pickle.dumps(SaliencyMask.from_bool(many))) < 50 * 1000
    mask = SaliencyMask.from_bool({"w": torch.ones(3)})
    mask["w"].fill_(255)
    with pytest.raises(ValueError, match="unused high bits"):
        mask.resolve([("w", nn.Parameter(torch.ones(3)))])
