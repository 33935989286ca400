"""What people hand over as a dataset: taken with the right numbers, or refused in one sentence before work."""

from __future__ import annotations

import random
from collections import namedtuple
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    TensorDataset,
    default_collate,
    random_split,
)

import byline
from byline import batches

N = 11


class Items(Dataset):
    """Items from a function of their place."""

    def __init__(self, item, length=N):
        self.item, self.length = item, length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        if not 0 <= index < self.length:
            raise IndexError(index)
        return self.item(index)


generator = torch.Generator().manual_seed(3)
X, Y = torch.randn(N, 6, generator=generator), torch.randint(0, 3, (N,), generator=generator)
PAIRS = TensorDataset(X, Y)
Pair = namedtuple("Pair", "x y")


def mlp():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).eval()


def values(data, model=None, tests=PAIRS, output="classification", **options):
    model = mlp() if model is None else model
    task = byline.Task(model, output)
    found = byline.GradDot(task, byline.Independent([model]), progress=False, batch_size=4, **options).fit(data)
    return found.attribute(tests).values


def refused(data, *, model=None, output="classification", **options):
    model = mlp() if model is None else model
    task = byline.Task(model, output)
    method = byline.GradDot(task, byline.Independent([model]), progress=False, **options)
    with pytest.raises((ValueError, TypeError)) as caught:
        method.fit(data)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def by_autograd(data=PAIRS, tests=PAIRS):
    model = mlp()

    def gradients(of):
        rows = []
        for x, y in of:
            p = model(x[None]).softmax(1)[0, y]
            grads = torch.autograd.grad((p / (1 - p)).log(), list(model.parameters()))
            rows.append(torch.cat([g.flatten() for g in grads]) * 1.0)
        return torch.stack(rows)

    q = torch.stack([1 - model(x[None]).softmax(1)[0, y] for x, y in data]).detach()
    return (gradients(tests) @ gradients(data).T * q).numpy()


def close(found, expected=None):
    np.testing.assert_allclose(found, by_autograd() if expected is None else expected, rtol=2e-3, atol=1e-5)


# datasets


class Columns:
    """As the package datasets has it: rows are dicts of plain numbers and lists, or of tensors on demand."""

    def __init__(self, columns, form=None):
        self.columns, self.form = columns, form

    def __len__(self):
        return len(next(iter(self.columns.values())))

    def __getitem__(self, index):
        if isinstance(index, str):
            return self.columns[index]
        row = {key: column[index] for key, column in self.columns.items()}
        return {k: v if self.form is None or isinstance(v, str) else torch.tensor(v) for k, v in row.items()}

    def __getitems__(self, indices):
        return [self[index] for index in indices]

    def with_format(self, form):
        return Columns(self.columns, form)


def test_datasets_of_every_make_give_the_same_numbers():
    expected = by_autograd()
    half = [int(i) for i in torch.randperm(N, generator=torch.Generator().manual_seed(0))]
    named = {"input": X.tolist(), "labels": Y.tolist()}
    for data in (
        list(PAIRS),
        tuple(PAIRS),
        [[x, y] for x, y in PAIRS],
        [(x.numpy(), int(y)) for x, y in PAIRS],
        Items(lambda i: Pair(X[i], int(Y[i]))),
        Items(lambda i: {"input": X[i], "labels": int(Y[i])}),
        Columns(named).with_format("torch"),
        dict(enumerate(PAIRS)),
        ConcatDataset([Subset(PAIRS, range(4)), Subset(PAIRS, range(4, N))]),
        DataLoader(PAIRS, batch_size=4, drop_last=True),
        DataLoader(PAIRS, batch_sampler=BatchSampler(SequentialSampler(PAIRS), 3, True)),
        DataLoader(list(PAIRS), batch_size=4, collate_fn=lambda rows: default_collate(rows)),
    ):
        model = mlp()
        found = byline.GradDot(byline.Task(model), byline.Independent([model]), progress=False, batch_size=4).fit(data)
        close(found.attribute(data).values, expected)
    close(values(Subset(PAIRS, half)), expected[:, half])
    parts = random_split(PAIRS, [6, 5], torch.Generator().manual_seed(0))
    close(values(parts[0]), expected[:, parts[0].indices])


def columns():
    pd = pytest.importorskip("pandas")
    frame = pd.DataFrame(X.numpy())
    whole = "TensorDataset(torch.as_tensor(X, dtype=torch.float32), torch.as_tensor(y))"
    return {
        "arrays": ((X.numpy(), Y.numpy()), f"tuple of 2 columns (ndarray (11, 6), ndarray (11,)), which.*{whole}"),
        "two arrays of two": ((X[:2].numpy(), Y[:2].numpy()), "tuple of 2 columns"),
        "inputs and targets": ((X, X), "tuple of 2 columns (Tensor (11, 6), Tensor (11, 6)), which"),
        "tensors": ([X, Y], f"list of 2 columns (Tensor (11, 6), Tensor (11,)), which.*{whole}"),
        "table and labels": ((frame, pd.Series(Y.numpy())), f"columns (DataFrame (11, 6), Series (11,)).*{whole}"),
        "array and list": ((X.numpy(), Y.tolist()), "columns (ndarray (11, 6), list of 11)"),
        "lists": ((X.tolist(), Y.tolist()), "columns (list of 11, list of 11)"),
        "table": (frame, "is a pandas DataFrame, which is indexed by column; expected.*X.to_numpy()"),
        "labels": (pd.Series(Y.numpy()), "is a pandas Series"),
        "dict": ({"x": X, "y": Y}, "is a dict with the keys 'x', 'y'; expected.*TensorDataset"),
        "splits": ({"train": PAIRS, "test": PAIRS}, "keys 'train', 'test'; expected.*the one split"),
        "path": ("data/train.csv", "is a str, 'data/train.csv'; expected"),
        "generator": ((pair for pair in PAIRS), "is a generator without __len__.*or a list of the items"),
        "fails": (Items(lambda i: {}[i]), r"[0] cannot be read (KeyError: 0); expected an example at every place"),
    }


@pytest.mark.parametrize("name", columns())
def test_what_is_indexed_otherwise_is_refused(name):
    data, message = columns()[name]
    attributor = byline.GradDot(byline.Task(mlp()), byline.Independent([mlp()]), progress=False).fit(PAIRS)
    for call, whose in (
        (attributor.fit, "train_set"),
        (attributor.attribute, "test_set"),
        (attributor.top, "test_set"),
    ):
        with pytest.raises((TypeError, ValueError)) as caught:
            call(data)
        text = str(caught.value)
        assert text.startswith(whose)
        assert all(part in text for part in message.split(".*")), text


def test_loaders_that_do_not_go_through_their_dataset_in_order():
    own = [[2, 0], [1, 3]]
    for loader, message in (
        (DataLoader(PAIRS, shuffle=True), "shuffles or samples (RandomSampler); expected.*(train_set.dataset)"),
        (DataLoader(PAIRS, batch_sampler=own), "shuffles or samples (list)"),
        (DataLoader(PAIRS, batch_sampler=BatchSampler(RandomSampler(PAIRS), 3, False)), "samples (RandomSampler)"),
        (DataLoader(PAIRS, sampler=SequentialSampler(range(5))), "samples (SequentialSampler)"),
        (DataLoader(PAIRS, batch_size=None), "batch_size=None, which makes no batches"),
    ):
        text = refused(loader)
        assert all(part in text for part in message.split(".*")), text


def test_a_test_loader_with_a_collate_of_its_own():
    doubled = DataLoader(list(PAIRS), collate_fn=lambda rows: (2 * default_collate(rows)[0], default_collate(rows)[1]))
    with pytest.raises(ValueError, match="test_set is a DataLoader whose collate_fn makes other batches than those of"):
        values(list(PAIRS), tests=doubled)
    twice = [(x / 2, y) for x, y in PAIRS]
    loader = DataLoader(twice, collate_fn=doubled.collate_fn)
    close(values(loader, tests=loader))


# randomness


def noisy(rows):
    x, y = default_collate(rows)
    return x + 0.1 * torch.randn_like(x), y


def forked(rows):
    with torch.random.fork_rng():
        return noisy(rows)


def numpy_noise(rows):
    x, y = default_collate(rows)
    return x + 0.1 * np.random.rand(), y  # noqa: NPY002


def python_noise(rows):
    x, y = default_collate(rows)
    return x + 0.1 * random.random(), y


def popping(rows):
    return default_collate([(row.pop("x"), row["y"]) for row in rows])


@pytest.mark.parametrize("collate", [noisy, forked, numpy_noise, python_noise])
def test_a_random_collate_is_refused_and_a_seeded_one_is_not(collate):
    text = refused(list(PAIRS), collate=collate)
    assert "collate gives another batch on a second call with train_set[0, 5, 10]" in text
    assert "collate gives another batch" in refused(DataLoader(list(PAIRS), collate_fn=collate))

    def seeded(rows):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            x, y = default_collate(rows)
            return x + 0 * torch.randn_like(x), y

    close(values(list(PAIRS), collate=seeded))


def test_a_collate_that_changes_its_items_is_refused():
    rows = [{"x": x, "y": y} for x, y in PAIRS]
    assert "train_set[0, 5, 10] does not go into one batch (KeyError: 'x')" in refused(rows, collate=popping)


def test_masked_tokens_are_refused_and_padding_is_not():
    transformers, hf = pytest.importorskip("transformers"), pytest.importorskip("byline.hf")
    import language

    tokenizer = language.tokenizer()
    tokenizer.add_special_tokens({"mask_token": "<unk>"})
    rows = [tokenizer(text) for text in language.texts(6)]
    model = language.gpt2()
    masking = transformers.DataCollatorForLanguageModeling(tokenizer, mlm=True)
    padding = transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False)
    text = refused(rows, model=model, output="language-modeling", collate=masking)
    assert "collate gives another batch on a second call" in text
    found = values(rows, model, rows, "language-modeling", collate=padding)
    texts = hf.dataset(language.texts(6), tokenizer)
    np.testing.assert_allclose(found, values(texts, model, texts, "language-modeling"), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("seed", range(12))
def test_a_flip_every_second_time_is_seen(seed):
    torch.manual_seed(seed)
    data = Items(lambda i: (X[i].flip(0) if torch.rand(()) < 0.5 else X[i], Y[i]))
    assert "is not the same on a second read" in refused(data)


def test_looking_for_randomness_leaves_the_random_state_alone():
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    random.seed(5)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    assert not batches.repeats(lambda: [f(list(PAIRS)) for f in (noisy, numpy_noise, python_noise)])
    with pytest.raises(ValueError, match="second"):
        batches.as_dataset(Items(lambda i: (torch.randn(6), np.random.rand(), random.random())), "x")  # noqa: NPY002
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()  # noqa: NPY002
    assert before[2] == random.getstate()


# batches


def test_entries_per_example_are_taken_picked_and_repeated_with_them():
    names, boxes = ["a", "b", "c"], [{"box": torch.ones(2)}, {"box": torch.zeros(5)}, {"box": torch.zeros(1)}]
    batch = {
        "boxes": boxes,
        "names": names,
        "x": torch.arange(3.0),
        "nested": (torch.eye(3), ("u", "v", "w")),
        "array": np.arange(6).reshape(3, 2),
        "none": [None, None, None],
        "shared": ["p", "q"],
        "pair": (1, None, 2),
        "rate": torch.tensor(0.5),
    }
    assert batches.size(batch) == 3
    got = batches.take(batch, 1, 3)
    assert (got["names"], got["nested"][1], got["none"]) == (["b", "c"], ("v", "w"), [None, None])
    assert got["boxes"] == boxes[1:]
    assert got["array"].tolist() == [[2, 3], [4, 5]]
    assert (got["shared"], got["pair"], float(got["rate"])) == (["p", "q"], (1, None, 2), 0.5)
    got = batches.pick(batch, [2, 0])
    assert (got["names"], got["x"].tolist(), got["array"].tolist()) == (["c", "a"], [2, 0], [[4, 5], [0, 1]])
    assert got["boxes"] == [boxes[2], boxes[0]]
    got = batches.tile(batch, 2)
    assert (got["names"], got["x"].tolist()) == (names * 2, [0, 1, 2, 0, 1, 2])
    assert got["array"].tolist() == 2 * batch["array"].tolist()
    assert batches.take([[torch.eye(3), torch.eye(3)], torch.ones(3)], 0, 1)[0][1].tolist() == [[1, 0, 0]]


def test_an_output_that_reads_names_sees_those_of_its_examples():
    scale = {"a": 1.0, "b": -2.0, "c": 0.5}
    names = [random.Random(i).choice("abc") for i in range(N)]
    data = Items(lambda i: {"x": X[i], "name": names[i]})
    model = mlp()

    def output(model, batch):
        return model(batch["x"])[:, 0] * torch.tensor([scale[name] for name in batch["name"]])

    plain = values(Items(lambda i: {"x": X[i]}), model, Items(lambda i: {"x": X[i]}), lambda m, b: m(b["x"])[:, 0])
    factor = np.array([scale[name] for name in names])
    close(values(data, model, data, output), plain * factor[:, None] * factor)


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(6, 3)

    def forward(self, x, mask):
        return self.a(x * mask.sum(0) / len(mask))


def test_tensors_without_a_row_per_example_are_refused():
    torch.manual_seed(0)
    model = Masked().eval()
    rows = list(PAIRS)

    def shared(length):
        def collate(items):
            x, y = default_collate(items)
            return x, torch.ones(length, 6), y

        return collate

    for length in (2, 3, 4, 11, 256):
        text = refused(rows, model=model, collate=shared(length))
        assert f"the batch's [1] has {length} rows for any number of examples of train_set" in text
    once = values(rows, model, rows, collate=shared(1))
    np.testing.assert_allclose(values(rows, model, rows, collate=shared(5000)), once, rtol=1e-4, atol=1e-6)

    def sequence_first(items):
        x, y = default_collate(items)
        return x.T, y

    assert "the batch's [0] has 6 rows for any number of examples" in refused(rows, collate=sequence_first)

    def packed(items):
        x, y = default_collate(items)
        return {"input": x.flatten(), "labels": y}

    text = refused(rows, collate=packed)
    assert "the batch's ['input'] has 18 rows for 3 examples of train_set and 12 for 2" in text

    def ragged(items):
        return [x for x, _ in items], torch.stack([y for _, y in items])

    assert "the batch's [0] has 3 rows for 3 examples" not in refused(rows, collate=ragged)

    def classes(items):
        return {**dict(zip(("input", "labels"), default_collate(items), strict=True)), "classes": ["a", "b", "c"]}

    assert "the batch's ['classes'] has 3 rows for any number" in refused(rows, collate=classes)


# the model


@dataclass
class Row:
    x: torch.Tensor
    y: int


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.places, self.out = nn.Embedding(10, 4), nn.Embedding(6, 4), nn.Linear(4, 3)

    def forward(self, ids):
        places = torch.arange(ids.shape[1]).expand(ids.shape)
        return self.out((self.words(ids) + self.places(places)).mean(1))


def picture_model():
    parts = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    return nn.Sequential(*parts).eval()


def grey():
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(2 * 16, 3)).eval()


def image():
    return pytest.importorskip("PIL.Image").new("RGB", (8, 8))


def pair(x, y=1):
    return lambda i: (x() if callable(x) else x, y)


UNCLEAR = {
    "float64": (mlp, lambda i: (X[i].double(), 1), "(float64 (3, 6)).*expected inputs of float32: x.to(torch.float32)"),
    "array": (
        mlp,
        lambda i: (X[i].double().numpy(), 1),
        "[0] is (array of float64 (6,), int); expected inputs of float32",
    ),
    "uint8": (mlp, pair(torch.zeros(6, dtype=torch.uint8)), "expected inputs of float32"),
    "ints": (mlp, pair(torch.zeros(6, dtype=torch.long)), "expected inputs of float32"),
    "width": (
        mlp,
        pair(torch.zeros(7)),
        "its 0, Linear(in_features=6.*[0] is (float32 (7,), int); expected inputs of a shape",
    ),
    "file name": (
        mlp,
        lambda i: (X[i], 1, f"{i}.png"),
        "expected examples without what is no tensor (tuple of 3 × str)",
    ),
    "key": (
        mlp,
        lambda i: {"input": X[i], "labels": 1, "name": "a", "id": 3},
        "expected examples without 'name', 'id'",
    ),
    "other names": (
        mlp,
        lambda i: {"features": X[i], "labels": 1},
        "expected (*inputs, label) in the order of the model's arguments (input)",
    ),
    "lists": (mlp, lambda i: (X[i].tolist(), 1), "expected tensors where it has lists of numbers"),
    "None": (mlp, lambda i: (X[i], 1, None), "[0] is (float32 (6,), int, None); expected no None"),
    "no label": (mlp, lambda i: (X[i],), "the labels are missing.*[0] is (float32 (6,))"),
    "label None": (mlp, lambda i: (X[i], None), "expected no None"),
    "label str": (mlp, lambda i: (X[i], "cat"), "integer labels (3,); train_set[0] is (float32 (6,), str 'cat')"),
    "one-hot": (mlp, lambda i: (X[i], torch.eye(3)[0]), "integer labels (3,); for one-hot rows.*train_set[0] is"),
    "out of range": (mlp, lambda i: (X[i], 3), "train_set[0]: label 3 is out of range; expected 0 to 2"),
    "negative": (mlp, lambda i: (X[i], -1), "train_set[0]: label -1 is out of range"),
    "lengths": (
        mlp,
        lambda i: (torch.zeros(6 + i % 2), 1),
        "[0] is (float32 (6,), int) and train_set[1] is (float32 (7,), int); expected all of one form, or collate=",
    ),
    "picture": (picture_model, pair(image), "[0] is (Image, int); expected a tensor of the picture"),
    "dataclass": (mlp, lambda i: Row(X[i], 1), "[0] is Row; expected tensors, numbers"),
    "channels last": (picture_model, pair(torch.zeros(8, 8, 3)), "expected channels first: x.permute(2, 0, 1)"),
    "bytes last": (picture_model, pair(torch.zeros(8, 8, 3, dtype=torch.uint8)), "expected channels first, in float32"),
    "no channel": (grey, pair(torch.zeros(6, 6)), "expected a dimension for the channel: x.unsqueeze(0)"),
    "not flat": (lambda: nn.Linear(36, 3).eval(), pair(torch.zeros(6, 6)), "expected flat inputs: x.flatten()"),
    "too long": (
        lambda: Words().eval(),
        pair(torch.zeros(7).long()),
        "(10, 6 rows), where the batch has numbers up to 0 and a length of 7",
    ),
    "unknown word": (lambda: Words().eval(), pair(torch.full((5,), 10)), "numbers up to 10 and a length of 5"),
    "words as floats": (lambda: Words().eval(), pair(torch.zeros(5)), "expected inputs of integers: x.long()"),
    "text": (lambda: Words().eval(), lambda i: ("the cat", 1), "expected numbers where it has strings"),
    "text alone": (
        mlp,
        lambda i: "the cat",
        "[0] is str 'the cat'; expected byline.hf.dataset(texts, tokenizer) for texts",
    ),
    "half model": (lambda: mlp().bfloat16(), lambda i: (X[i], 1), "expected inputs of bfloat16"),
}


@pytest.mark.parametrize("name", UNCLEAR)
def test_what_a_model_does_not_take_is_said_in_a_sentence(name):
    build, item, message = UNCLEAR[name]
    text = refused(Items(item), model=build())
    assert all(part in text for part in message.split(".*")), text
    assert "train_set" in text
    if build is not mlp:
        return
    attributor = byline.GradDot(byline.Task(mlp()), byline.Independent([mlp()]), progress=False).fit(PAIRS)
    for call in (attributor.attribute, attributor.votes, attributor.top):
        with pytest.raises((ValueError, TypeError), match="test_set") as caught:
            call(Items(item))
        assert message.split("train_set")[-1] in str(caught.value).replace("test_set", "train_set") or ".*" in message


def test_the_first_error_is_kept():
    with pytest.raises(ValueError, match="the model does not take train_set") as caught:
        values(Items(lambda i: (X[i].double(), 1)))
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_an_output_of_ones_own_that_breaks():
    text = refused(PAIRS, output=lambda model, batch: model(batch["x"])[:, 0])
    assert "what the task asks of a batch of train_set, (float32 (3, 6), int64 (3,)), raised TypeError" in text


def test_rows_of_token_lists_and_text_columns_of_a_language_model():
    pytest.importorskip("transformers")
    import language

    model = language.gpt2()
    ids = [[3, 4, 5, 6], [4, 5, 6, 7], [5, 6, 7, 8]]
    plain = Columns({"input_ids": ids})
    text = refused(plain, model=model, output="language-modeling")
    assert "train_set[0] is {'input_ids': list of 4 × int}; expected tensors where it has lists" in text
    named = Columns({"input_ids": ids, "text": ["a", "b", "c"]}).with_format("torch")
    expected = values(torch.tensor(ids), model, torch.tensor(ids), "language-modeling")
    # GPT-2 takes whatever comes by name
    for rows in (plain.with_format("torch"), named):
        np.testing.assert_allclose(values(rows, model, rows, "language-modeling"), expected, rtol=1e-4)


class Complex(nn.Module):
    def __init__(self):
        super().__init__()
        self.w, self.a = nn.Parameter(torch.randn(6, 3, dtype=torch.cfloat)), nn.Linear(3, 3)

    def forward(self, x):
        return self.a((x.to(torch.cfloat) @ self.w).abs())


def test_numbers_that_have_no_gradient():
    model = Complex().eval()
    assert "parameter 'w' is complex64; expected real ones" in refused(PAIRS, model=model)
    assert np.isfinite(values(PAIRS, model, params="a.*")).all()
    pytest.importorskip("torch.ao.quantization")
    quantised = torch.ao.quantization.quantize_dynamic(mlp(), {nn.Linear})
    with pytest.raises(ValueError, match=r"the model has a quantised layer \('0', Linear\)"):
        byline.Task(quantised)


def test_methods_that_ask_less_of_the_model_are_tried_with_less():
    """An output without a target is enough for embeddings, and nothing at all for noise."""
    model = mlp()
    task = byline.Task(model, output=lambda m, b: m(b[0])[:, 0])
    lone = TensorDataset(X)
    ensemble = byline.Independent([model])
    assert byline.Random(byline.Task(model), ensemble, progress=False).fit(lone).attribute(lone).values.shape == (N, N)
    found = byline.RepresentationSimilarity(task, ensemble, progress=False).fit(lone)
    assert np.isfinite(found.attribute(lone).values).all()


class Thing:
    """Whose repr is its address."""

    def __init__(self, x):
        self.x = [{"x": x}]
        self.own = self


def test_digests_see_into_dataclasses_and_sparse_tensors():
    big = torch.zeros(2000)
    other = big.clone()
    other[1000] = 1
    assert repr(Row(big, 1)) == repr(Row(other, 1))
    assert batches.digest_of(Row(big, 1)) != batches.digest_of(Row(other, 1))
    assert batches.digest_of(big.to_sparse()) == batches.digest_of(big)
    words = [np.array(["".join(["lo", end]), None], dtype=object) for end in ("ng", "ng", "st")]
    assert batches.digest_of(words[0]) == batches.digest_of(words[1]) != batches.digest_of(words[2])
    for make in (lambda x: SimpleNamespace(a=x), Thing):
        assert batches.digest_of(make(big)) == batches.digest_of(make(big.clone())) != batches.digest_of(make(other))
