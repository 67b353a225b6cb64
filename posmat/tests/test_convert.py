"""A model in one call: which layers become a multiplier's, and that it is a model as before."""

import copy
import io
import pickle
import warnings
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import posmat as pm
from posmat.network import layers
from posmat.tests.conftest import no_cuda
from posmat.tests.test_inexact import get

pytestmark = pytest.mark.usefixtures("one_thread")
NAMES = ["features.0", "features.4", "one", "out"]
IMAGES = torch.rand(48, 1, 6, 9, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(48) % 3  # told by which third is bright
for kind in range(3):
    IMAGES[kind::3, :, :, 3 * kind : 3 * kind + 3] += 1


def network() -> nn.Sequential:
    """Convolutions, a BatchNorm, a container, and a layer that is there twice."""
    torch.manual_seed(0)
    parts = [nn.Conv2d(1, 6, 3, padding="same"), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2)]
    parts += [nn.Conv2d(6, 6, 3, groups=6, padding=1, padding_mode="reflect"), nn.Flatten()]
    found = OrderedDict(features=nn.Sequential(*parts), one=nn.Linear(72, 72), relu=nn.ReLU())
    return nn.Sequential(found | {"again": found["one"], "out": nn.Linear(72, 3)})


def convert(model: nn.Module, how="or_pairs", batches=(IMAGES,), **words) -> nn.Module:
    return pm.convert_model(model, how, batches, **words)


def names_of(model: nn.Module) -> dict[str, str]:
    found = model.named_modules()
    return {name: m.multiplier.name for name, m in found if isinstance(m, layers.InexactLayer)}


@pytest.mark.parametrize("training", [True, False])
def test_the_given_model_is_not_changed_and_the_copy_is_as_it_was(training):
    model = network().train(training)
    model.features[1].eval()  # as where a BatchNorm is frozen
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    made = convert(model)
    assert names_of(model) == {} and list(names_of(made)) == NAMES and made.again is made.one
    for one in (model, made):
        state = one.state_dict()
        assert all(torch.equal(state[name], value) for name, value in before.items())
        assert [m.training for m in one.modules()] == modes
        assert not any(m._forward_pre_hooks or "forward" in vars(m) for m in one.modules())
    own = {p.data_ptr() for p in model.parameters()}
    assert own.isdisjoint(p.data_ptr() for p in made.parameters())


@torch.no_grad()
def test_scales_are_those_of_the_largest_inputs_and_numbers_are_near_the_float_ones():
    model, batches = network().eval(), iter([(IMAGES[:5], "a label"), [IMAGES[5:]]])
    made = convert(model, {"*": "exact", "o*": get("4 bits signed")}, batches)
    first = model.features(IMAGES)
    second = model.one(first).relu()
    for name, largest in (
        ("features.0", IMAGES.max() / 127),
        ("one", max(first.abs().max(), second.max()) / 7),
        ("out", model.one(second).abs().max() / 7),
    ):
        torch.testing.assert_close(made.get_submodule(name).input_scale, largest)
    plain, found = model(IMAGES), convert(model, "exact")(IMAGES)
    assert 0 < (found - plain).norm() < 0.05 * plain.norm()
    loader = DataLoader(TensorDataset(IMAGES, LABELS), 20)
    assert torch.equal(convert(model, "exact", loader)(IMAGES), found)


def test_or_pairs_is_exact_through_a_network_of_fibonacci_weights():
    for weights in layers.WEIGHTS:
        made = [convert(network(), how, weights=weights).eval() for how in ("or_pairs", "exact")]
        assert torch.equal(made[0](IMAGES), made[1](IMAGES)) == (weights == "fibonacci")


def test_the_last_pattern_that_matches_wins_and_what_none_matches_is_told():
    words = {"*": "exact", "o*": "or_pairs", "features.?": get("rank 3"), "*ut": "kulkarni"}
    made = convert(network(), words)
    assert list(names_of(made).values()) == ["rank 3", "rank 3", "or_pairs", "kulkarni"]
    for how, meant, found in (
        ({"o*": "exact"}, None, NAMES[2:]),
        ("exact", ["features.*", "out"], [*NAMES[:2], "out"]),
        ("exact", "again", ["one"]),  # the other name of a shared layer
    ):
        with pytest.warns(UserWarning, match=r"left in float: features\.\d|one \(Linear\)"):
            made = convert(network(), how, layers=meant)
        assert list(names_of(made)) == found
    with warnings.catch_warnings():  # a second call converts the rest, and nothing is left
        warnings.simplefilter("error")
        found = list(names_of(convert(made)).values())
    assert found == ["or_pairs", "or_pairs", "exact", "or_pairs"]


def test_what_is_left_in_float_is_told_once():
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].up, model[0].lstm = nn.ConvTranspose2d(4, 4, 3), nn.LSTM(4, 4)
    model[0].attention, model[0].table = nn.MultiheadAttention(4, 2), nn.Embedding(4, 4)
    model[0].own = nn.Linear(4, 4)
    model[0].own.forward = lambda x: x
    model[0].normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    with pytest.warns(UserWarning, match="left in float") as told:
        convert(model, batches=[torch.ones(2, 4)])
    text = str(told.pop().message)
    for word in (
        "up (ConvTranspose2d)",
        "lstm (LSTM)",
        "attention.out_proj",
        "0.normed",
        "own (Linear)",
    ):
        assert word in text
    assert not told and "table" not in text and text.count("(Linear)") == 1


def test_a_model_that_is_a_layer_and_layers_that_share_parameters():
    x = torch.randn(5, 4)
    with pytest.raises(ValueError, match="layer 'the model' was given a NaN"):
        convert(nn.Linear(4, 4), batches=[x])(x * torch.nan)
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    made = convert(tied, batches=[x])
    assert made[0].weight is made[1].weight and made[0].input_scale != made[1].input_scale
    made(x).sum().backward()
    assert convert(tied, batches=[0 * x])(0 * x).isfinite().all()


@pytest.mark.parametrize("gradient", layers.GRADIENTS)
@pytest.mark.parametrize("how", ["or_pairs", "truncated"])
def test_training_lowers_the_loss_by_what_pytorch_brings(gradient, how):
    made = convert(network(), how, gradient=gradient)
    loader = DataLoader(TensorDataset(IMAGES, LABELS), 16, shuffle=True)
    optimizer = torch.optim.AdamW(made.parameters(), lr=0.01)
    schedule, losses = torch.optim.lr_scheduler.StepLR(optimizer, 10), []
    for _ in range(12):
        for images, labels in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(made(images), labels)
            loss.backward()
            assert all(p.grad is not None and p.grad.any() for p in made.parameters())
            optimizer.step()
            losses.append(float(loss.detach()))
        schedule.step()
    assert sum(losses[-3:]) < 0.5 * sum(losses[:3])


def test_what_was_trained_is_saved_and_loaded():
    made = convert(network(), weights="fibonacci")
    made(IMAGES).sum().backward()
    torch.optim.SGD(made.parameters(), 0.05).step()
    y = made.eval()(IMAGES)
    anew = convert(network(), batches=[2 * IMAGES], weights="fibonacci").eval()
    assert not torch.equal(anew(IMAGES), y)
    anew.load_state_dict(made.state_dict())
    file = io.BytesIO()
    torch.save(made, file)  # which pickles
    file.seek(0)
    for one in (anew, torch.load(file, weights_only=False), copy.deepcopy(made)):
        assert torch.equal(one(IMAGES), y)
        one.train()(IMAGES).sum().backward()  # and training goes on
        assert all(p.grad.any() for p in one.parameters())
    assert len(pickle.dumps(made)) == len(pickle.dumps(made.train()))  # without what is prepared


def test_what_cannot_be_converted_is_refused_by_name():
    spare, bypassing = nn.Sequential(nn.ReLU()), nn.Sequential(nn.Linear(4, 4))
    spare[0].one = nn.Linear(2, 2)
    bypassing.forward = lambda x: F.linear(x, bypassing[0].weight)
    infinite, x = nn.Sequential(nn.Linear(4, 4)), [torch.ones(2, 4)]
    infinite[0].weight.data[1, 1] = torch.inf
    for message, words in (
        ("nothing to convert", {"model": nn.ReLU()}),
        ("nothing to convert", {"how": {}}),
        ("nothing to convert", {"layers": []}),
        (r"never reached layer 'features\.0' \(4 in all\)", {"batches": []}),
        (r"never reached layer '0\.one'", {"model": spare, "batches": x}),
        ("never reached layer '0' .*takes its weights", {"model": bypassing, "batches": x}),
        (r"layer 'features\.0' meets nan in calibration", {"batches": [IMAGES * torch.nan]}),
        (r"layer 'features\.0' meets inf in calibration", {"batches": [IMAGES * torch.inf]}),
        ("layer '0' has a weight that is not finite", {"model": infinite, "batches": x}),
        (r"no layer is named 'feature\.0': there are features\.0", {"how": {"feature.0": "exact"}}),
        (r"no layer is named 'features\.1'", {"layers": ["features.1"]}),
        ("or_pairs", {"how": {"*": "or_pair"}}),
        ("fibonacci", {"weights": "fibonaci"}),
        ("fitted", {"gradient": "fited"}),
    ):
        with pytest.raises(ValueError, match=message):
            convert(**{"model": network()} | words)
    with pytest.raises(TypeError, match="int is not a multiplier"):
        convert(network(), 3)


@pytest.mark.filterwarnings("ignore:left in float", "ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("masked", [False, True])
@torch.no_grad()
def test_the_fast_path_around_an_encoders_layers_is_closed(masked, monkeypatch):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    plain, calls = nn.TransformerEncoder(layer, 2).eval(), []
    x, forward = torch.randn(3, 5, 8), pm.InexactLinear.forward
    x[1, 3:] = 0
    padded = (x == 0).all(2)
    words = {"src_key_padding_mask": padded} if masked else {}
    made = convert(plain, "truncated", [x])
    monkeypatch.setattr(pm.InexactLinear, "forward", lambda *a: calls.append(1) or forward(*a))
    y = made(x, **words)
    assert len(names_of(made)) == len(calls) == 4
    monkeypatch.setattr(torch.backends.mha, "get_fastpath_enabled", lambda: False)
    slow, of_plain = made(x, **words)[~padded], plain(x, **words)[~padded]
    torch.testing.assert_close(y[~padded], slow, rtol=1e-2, atol=2e-2)
    assert (y[~padded] - of_plain).norm() > 5 * (y[~padded] - slow).norm()


@no_cuda
def test_a_model_on_cuda_is_converted_there():
    y, made = convert(network()).eval()(IMAGES), convert(network().cuda())
    assert all(t.is_cuda for t in made.state_dict().values())
    torch.testing.assert_close(made.eval()(IMAGES.cuda()).cpu(), y, rtol=0.05, atol=0.05)
    with torch.autocast("cuda", torch.float16):
        made.train()(IMAGES.cuda()).sum().backward()
