"""An adapter that is switched to is the one that a fresh model loads, and the backbone survives."""

from __future__ import annotations

import copy
import itertools
import random
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import furina
from furina.adapters import AdapterConfig
from furina.errors import AdapterFileError, ConfigurationError
from furina.model import adapter_sets
from furina.model.adapter_sets import AdapterSet
from tests.helpers import BACKBONES, fingerprint, perturb, raw, small, task_loss, tokens
from tests.model.test_combination import refused

SOME = ["q_proj", "down_proj"]
CONFIGS: dict[str, tuple[AdapterConfig, list[str] | None]] = {
    **{method: (small(method), None) for method in furina.methods()},
    "furina_subtract": (small("furina", start="subtract"), SOME),
    "pissa_in_place": (small("pissa", in_place=True), None),
    "lora_some": (small("lora", rank=5), SOME),
}
MERGEABLE = [name for name, (config, _) in CONFIGS.items() if config.mergeability().ok]
PAIRS = [*itertools.pairwise([*CONFIGS, next(iter(CONFIGS))]), ("pissa_in_place", "dora")]
MERGEABLE_PAIRS = [*itertools.pairwise([*MERGEABLE, MERGEABLE[0]]), ("pissa_in_place", "dora")]
every_config = pytest.mark.parametrize("name", CONFIGS)


def fresh(dtype: torch.dtype = torch.float32) -> nn.Module:
    return BACKBONES["llama"](dtype)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    found: Tensor = model(**tokens()).logits
    return found


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return a folder with every parameter moved for each config."""
    root = tmp_path_factory.mktemp("adapters")
    for seed, (name, (config, targets)) in enumerate(CONFIGS.items()):
        model = furina.adapt(fresh(), config, targets=targets, seed=seed)
        perturb(model, seed=100 * seed)
        furina.save(model, root / name)
    return {name: root / name for name in CONFIGS}


@pytest.fixture(scope="module")
def expected(folders: dict[str, Path]) -> dict[str | None, Tensor]:
    """Return the logits of a fresh model with each adapter, and with none."""
    found = {name: logits(furina.load(folder, fresh())) for name, folder in folders.items()}
    assert len({raw(tensor) for tensor in found.values()}) == len(found)
    return {None: logits(fresh()), **found}


@pytest.fixture(scope="module")
def merged_logits(folders: dict[str, Path]) -> dict[str, Tensor]:
    """Return the logits of a fresh model with each adapter merged."""
    found = {}
    for name in MERGEABLE:
        model = furina.load(folders[name], fresh())
        furina.merge(model)
        found[name] = logits(model)
    return found


def loaded(folders: dict[str, Path], *names: str, model: nn.Module | None = None) -> AdapterSet:
    adapters = AdapterSet(fresh() if model is None else model)
    for name in names:
        adapters.load(name, folders[name])
    return adapters


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_a_switched_model_is_a_freshly_loaded_one_to_the_bit(pair, folders, expected) -> None:
    one, other = pair
    adapters = loaded(folders, one, other)
    before = fingerprint(adapters.model)
    for name in (one, other, one, None, other, None):
        adapters.use(name)
        assert adapters.active == name
        assert furina.is_adapted(adapters.model) == (name is not None)
        assert torch.equal(logits(adapters.model), expected[name]), name
    assert fingerprint(adapters.model) == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_in_every_dtype_the_backbone_comes_back_and_the_logits_are_those_of_a_fresh_load(
    dtype, folders
) -> None:
    adapters = loaded(folders, *CONFIGS, model=fresh(dtype))
    before = fingerprint(adapters.model)
    for name in CONFIGS:
        adapters.use(name)
        twin = furina.load(folders[name], fresh(dtype))
        assert torch.equal(logits(adapters.model), logits(twin)), name
    adapters.use(None)
    assert fingerprint(adapters.model) == before


def act(adapters: AdapterSet, folders: dict[str, Path], draw: random.Random) -> None:
    """Do one thing that is allowed now, chosen by `draw`."""
    model, active = adapters.model, adapters.active
    merged = active is not None and furina.is_merged(model)
    waiting = sorted(CONFIGS.keys() - set(adapters.names))
    chosen = draw.choice(["use", "use", "merge", "merge", "unmerge", "drop", "load", "combine"])
    if chosen == "use":
        adapters.use(draw.choice([*adapters.names, None]))
    elif chosen == "merge" and active in MERGEABLE and not merged:
        furina.merge(model)
    elif chosen == "unmerge" and merged:
        furina.unmerge(model)
    elif chosen == "drop" and len(adapters.names) > 2:
        adapters.drop(draw.choice(adapters.names))
    elif chosen == "load" and waiting:
        name = draw.choice(waiting)
        adapters.load(name, folders[name])
    elif chosen == "combine" and "lora" in adapters.names:
        adapters.combine("both", {"lora": 1.0})
        adapters.drop("both")


@pytest.mark.parametrize("seed", range(12))
def test_no_sequence_of_calls_changes_the_backbone_or_an_adapter(
    seed, folders, expected, merged_logits
) -> None:
    draw, model = random.Random(seed), fresh()
    before = fingerprint(model)
    adapters = loaded(folders, *draw.sample(list(CONFIGS), 4), model=model)
    for _ in range(30):
        act(adapters, folders, draw)
        merged = adapters.active is not None and furina.is_merged(model)
        assert torch.equal(logits(model), (merged_logits if merged else expected)[adapters.active])
    adapters.use(None)
    assert fingerprint(model) == before


@pytest.mark.parametrize("pair", MERGEABLE_PAIRS, ids="-".join)
def test_two_adapters_are_merged_one_after_another(pair, folders, expected, merged_logits) -> None:
    adapters = loaded(folders, *pair)
    model = adapters.model
    before = fingerprint(model)
    for name in pair * 2:
        adapters.use(name)
        assert not furina.is_merged(model)
        furina.merge(model)
        assert torch.equal(logits(model), merged_logits[name])
    adapters.use(None)
    assert fingerprint(model) == before
    for name in pair:
        adapters.use(name)
        assert torch.equal(logits(model), expected[name])


@pytest.mark.parametrize("name", MERGEABLE)
def test_adding_leaves_a_merged_model_as_it_is(name: str, folders) -> None:
    adapters = loaded(folders, name)
    adapters.use(name)
    furina.merge(adapters.model)
    before = fingerprint(adapters.model)
    adapters.load("other", folders["pissa_in_place"])
    adapters.add("new", small("furina"), seed=0)
    adapters.drop("other")
    assert adapters.active == name and furina.is_merged(adapters.model)
    assert fingerprint(adapters.model) == before
    adapters.use(name)
    assert furina.is_merged(adapters.model)


def test_switching_reads_no_file_and_writes_to_no_weight(folders, tmp_path: Path) -> None:
    copied = {name: tmp_path / name for name in ("furina", "dora")}
    for name, folder in copied.items():
        shutil.copytree(folders[name], folder)
    adapters = loaded(copied, *copied)
    shutil.rmtree(tmp_path)
    model = adapters.model
    places: dict[str, set[tuple[int, int, int]]] = {}
    for name in ("furina", "dora") * 3:
        adapters.use(name)
        for key, tensor in model.state_dict(keep_vars=True).items():
            seen = places.setdefault(f"{name}.{key}", set())
            seen.add((id(tensor), tensor.data_ptr(), tensor._version))
    assert all(len(seen) == 1 for seen in places.values())


@every_config
def test_an_adapter_that_waits_is_no_part_of_the_model(name: str, folders) -> None:
    other = "lora" if name != "lora" else "furina"
    adapters = loaded(folders, name, other)
    plain, twin = fresh(), furina.load(folders[name], fresh())
    assert list(adapters.model.state_dict()) == list(plain.state_dict())
    adapters.use(name)
    for of in (nn.Module.state_dict, lambda model: dict(model.named_parameters())):
        assert list(of(adapters.model)) == list(of(twin))
    assert furina.describe(adapters.model) == furina.describe(twin)
    flags = [parameter.requires_grad for parameter in adapters.model.parameters()]
    assert flags == [parameter.requires_grad for parameter in twin.parameters()]


@every_config
def test_training_the_one_in_use_leaves_the_others_alone(name: str, folders, expected) -> None:
    others = ("furina_subtract", "flylora", "slim", "pissa_in_place")
    adapters = loaded(folders, *{name: None, **dict.fromkeys(others)})
    model = adapters.model
    adapters.use(name)
    model.train()
    optimiser = torch.optim.SGD(furina.parameter_groups(model, 0.1))
    for _ in range(2):
        (task_loss(model, tokens()) + furina.auxiliary_loss(model)).backward()
        optimiser.step()
        optimiser.zero_grad()
        furina.after_step(model)
    model.eval()
    assert not torch.equal(logits(model), expected[name])
    trained = logits(model)
    for other in adapters.names:
        if other != name:
            adapters.use(other)
            assert torch.equal(logits(model), expected[other]), other
    adapters.use(name)
    assert torch.equal(logits(model), trained)


CASTS = [
    (name, dtype)
    for name, dtype in itertools.product(CONFIGS, (torch.bfloat16, torch.float64))
    # Its residual in bf16 is that of the W that it was made for; a fresh one's is bf16 W's.
    if (name, dtype) != ("pissa_in_place", torch.bfloat16)
]


@pytest.mark.parametrize(("name", "dtype"), CASTS)
def test_an_adapter_that_comes_back_follows_the_models_dtype(name: str, dtype, folders) -> None:
    adapters = loaded(folders, name)
    adapters.use(name)
    logits(adapters.model)  # fills what a layer keeps
    adapters.use(None)
    adapters.model.to(dtype)
    adapters.use(name)
    plain = fresh().to(dtype)
    assert torch.equal(logits(adapters.model), logits(furina.load(folders[name], plain)))


@pytest.mark.parametrize("name", ["furina", "dora", "pissa_in_place", "slim"])
def test_an_adapter_that_comes_back_follows_the_models_device(name: str, folders) -> None:
    adapters = loaded(folders, name)
    adapters.model.to("meta")
    adapters.use(name)
    assert {tensor.device.type for tensor in adapters.model.state_dict().values()} == {"meta"}


@pytest.mark.parametrize("mode", [True, False])
def test_an_adapter_that_comes_back_follows_the_models_mode(mode: bool, folders) -> None:
    adapters = loaded(folders, "furina", "dora")
    adapters.use("furina")
    adapters.model.train(not mode)
    adapters.use("dora")
    adapters.model.train(mode)
    for name in ("furina", None, "dora"):
        adapters.use(name)
        assert {module.training for module in adapters.model.modules()} == {mode}


def test_the_backbones_own_trainable_weights_come_back_as_they_are_left(folders) -> None:
    adapters = loaded(folders, "lora")
    head = adapters.model.lm_head.weight
    for flag in (False, True):
        head.requires_grad_(flag)
        adapters.use("lora")
        assert not head.requires_grad
        adapters.use(None)
        assert head.requires_grad == flag


def test_the_auxiliary_loss_is_that_of_the_adapter_in_use_after_its_own_forward(folders) -> None:
    adapters = loaded(folders, "furina", "mola")
    model = adapters.model.train()
    adapters.use("furina")
    task_loss(model, tokens())
    loss = furina.auxiliary_loss(model)
    adapters.use("mola")
    task_loss(model, tokens())
    assert furina.auxiliary_loss(model) != loss
    adapters.use("furina")
    with pytest.raises(ConfigurationError, match="There is no auxiliary loss"):
        furina.auxiliary_loss(model)
    task_loss(model, tokens())
    assert furina.auxiliary_loss(model) == loss


def test_saving_writes_the_adapter_in_use(folders, tmp_path: Path) -> None:
    adapters = loaded(folders, *CONFIGS)
    for name, folder in folders.items():
        adapters.use(name)
        furina.save(adapters.model, tmp_path / name)
        for file in folder.iterdir():
            assert (tmp_path / name / file.name).read_bytes() == file.read_bytes()


def test_the_adapter_that_a_model_has_becomes_the_first() -> None:
    model = furina.adapt(fresh(), small("furina"), seed=0)
    perturb(model)
    adapted, before = logits(model), fingerprint(model)
    adapters = AdapterSet(model)
    assert (adapters.names, adapters.active) == (("furina",), "furina")
    assert AdapterSet(model, "mine").names == ("mine",)
    assert fingerprint(model) == before
    adapters.use(None)
    assert torch.equal(logits(model), logits(fresh()))
    adapters.use("furina")
    assert torch.equal(logits(model), adapted)


def test_an_adapter_that_was_removed_is_still_in_the_set(folders, expected) -> None:
    adapters = loaded(folders, "furina")
    adapters.use("furina")
    furina.remove(adapters.model)
    assert (adapters.names, adapters.active) == (("furina",), None)
    adapters.use("furina")
    assert torch.equal(logits(adapters.model), expected["furina"])


def test_an_added_adapter_is_what_adapt_makes_and_waits() -> None:
    adapters = AdapterSet(fresh())
    adapters.add("new", "furina", targets=SOME, seed=3, rank=2, num_experts=4)
    assert adapters.active is None
    adapters.use("new")
    twin = furina.adapt(fresh(), "furina", targets=SOME, seed=3, rank=2, num_experts=4)
    one, other = (furina.adapter_state_dict(model) for model in (adapters.model, twin))
    assert {n: raw(t) for n, t in one.items()} == {n: raw(t) for n, t in other.items()}
    assert repr(adapters) == "AdapterSet(new; in use: new)"


def test_a_dropped_adapter_leaves_the_bare_backbone_and_frees_its_name(folders, expected) -> None:
    adapters = loaded(folders, "furina", "lora")
    before = fingerprint(adapters.model)
    adapters.use("furina")
    furina.merge(adapters.model)
    adapters.drop("lora")
    assert adapters.active == "furina"
    adapters.drop("furina")
    assert (adapters.names, adapters.active) == ((), None)
    assert fingerprint(adapters.model) == before
    adapters.load("furina", folders["lora"])
    adapters.use("furina")
    assert torch.equal(logits(adapters.model), expected["lora"])


def test_a_copy_of_the_set_lives_on_its_own(folders, expected) -> None:
    adapters = loaded(folders, "furina", "lora")
    adapters.use("lora")
    twin = copy.deepcopy(adapters)
    twin.use("furina")
    assert torch.equal(logits(twin.model), expected["furina"])
    assert torch.equal(logits(adapters.model), expected["lora"])
    with torch.no_grad():
        for parameter in twin.model.parameters():
            parameter.add_(1.0)
    adapters.use("furina")
    assert torch.equal(logits(adapters.model), expected["furina"])


def test_a_finetune_module_trains_the_adapter_in_use(folders) -> None:
    adapters = loaded(folders, "lora", "furina")
    adapters.use("lora")
    module = furina.FinetuneModule(adapters.model, learning_rate=1e-3)
    names = set(furina.adapter_parameters(adapters.model))
    assert {n.removeprefix("model.") for n, p in module.named_parameters() if p.requires_grad} == (
        names
    )


def test_wrong_names_and_foreign_adapters_are_one_sentence_and_change_nothing(folders) -> None:
    adapters = loaded(folders, "furina", "lora")
    adapters.use("lora")
    before = fingerprint(adapters.model)
    refused(lambda: adapters.use("furnia"), "no adapter 'furnia'", "Did you mean 'furina'")
    refused(lambda: adapters.drop("furnia"), "no adapter 'furnia'")
    refused(lambda: adapters.load("lora", folders["dora"]), "'lora' already", "drop it first")
    refused(lambda: adapters.add("lora"), "'lora' already")
    refused(lambda: adapters.add("x", "furnia"), "Unknown method 'furnia'")
    refused(lambda: adapters.add("x", targets=["nope"]), "'nope' matches no module")
    refused(lambda: AdapterSet(fresh(), "x"), "has no adapter")
    missing = folders["lora"].parent / "nowhere"
    refused(lambda: adapters.load("x", missing), "not a furina adapter", error=AdapterFileError)
    assert (adapters.names, adapters.active) == (("furina", "lora"), "lora")
    assert fingerprint(adapters.model) == before
    adapters.use(None)
    furina.adapt(adapters.model, small("dora"))
    before = fingerprint(adapters.model)
    for call in (
        lambda: adapters.use("lora"),
        lambda: adapters.use(None),
        lambda: adapters.load("x", folders["dora"]),
        lambda: adapters.active,
    ):
        refused(call, "a dora adapter that is not of this set", "furina.remove")
    adapters.drop("furina")
    assert adapters.names == ("lora",) and fingerprint(adapters.model) == before


def test_without_a_kept_base_every_switch_is_an_error_that_changes_nothing(folders) -> None:
    adapters = loaded(folders, "furina", "lora")
    adapters.use("furina")
    furina.merge(adapters.model, keep_base=False)
    before = fingerprint(adapters.model)
    for call in (
        lambda: adapters.use("lora"),
        lambda: adapters.use(None),
        lambda: adapters.drop("furina"),
        lambda: adapters.load("x", folders["dora"]),
        lambda: adapters.combine("x", {"lora": 1.0}),
    ):
        refused(call, "keep_base=False, so W is gone")
        assert fingerprint(adapters.model) == before
    assert (adapters.names, adapters.active) == (("furina", "lora"), "furina")


def test_a_linear_that_was_replaced_is_named(folders) -> None:
    adapters = loaded(folders, "furina")
    adapters.model.model.layers[1].self_attn.q_proj = nn.Linear(24, 32, bias=False)
    refused(lambda: adapters.use("furina"), "layers.1.self_attn.q_proj", "load the adapter again")
    assert adapters.active is None


def test_an_interrupted_load_leaves_the_adapter_in_use(folders, monkeypatch) -> None:
    adapters = loaded(folders, "lora")
    adapters.use("lora")
    before = fingerprint(adapters.model)

    def interrupted(folder: Path, model: nn.Module, check_backbone: bool) -> None:
        furina.adapt(model, small("pissa", in_place=True))
        raise KeyboardInterrupt

    monkeypatch.setattr(adapter_sets, "load", interrupted)
    with pytest.raises(KeyboardInterrupt):
        adapters.load("x", folders["furina"])
    assert (adapters.names, adapters.active) == (("lora",), "lora")
    assert fingerprint(adapters.model) == before
