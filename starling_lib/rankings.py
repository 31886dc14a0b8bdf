"""Rankings in the Nectar schema: load, check, split by prompt, turn into pairs.

A row of Nectar holds a `prompt` (a transcript that ends by asking the assistant to
speak) and `answers`, each with its text, the model it came from and a rank from 1
(best). Knows that schema and the file formats it comes in; knows nothing of models,
training, or how a judge came to its ranks.
"""

import gzip
import hashlib
import itertools
import json
import math
import re
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from datasets import (
    Dataset,
    DatasetDict,
    Features,
    IterableDataset,
    IterableDatasetDict,
    ReadInstruction,
    Value,
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
    load_dataset,
)
from huggingface_hub.errors import HFValidationError
from tqdm.auto import tqdm

# Read here, audited there: the audit's main questions are part of this module's face.
from starling_lib.audit import length_bias as length_bias
from starling_lib.audit import model_ratings as model_ratings
from starling_lib.audit import position_bias as position_bias
from starling_lib.audit import repeat_agreement as repeat_agreement
from starling_lib.chat import Message, transcript_to_messages

_MESSAGES = [{"role": Value("string"), "content": Value("string")}]
RANKING_FEATURES = Features(
    {
        "id": Value("string"),
        "prompt": _MESSAGES,
        "responses": [Value("string")],
        "models": [Value("string")],
        "finished": [Value("bool")],
        "ranks": [Value("float64")],
        "source": [Value("string")],
        "turns": Value("int64"),
        "good_natured": Value("bool"),
        "half": Value("string"),
    }
)
PAIR_FEATURES = Features(
    {"prompt": _MESSAGES, "chosen": _MESSAGES, "rejected": _MESSAGES}
)
_LINE_FEATURES = Features({"line": Value("int64"), "jsonl": Value("binary")})
_SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
# Bytes fetched beyond what a reader of a hub's file asks for. The default, 5 MB, would
# fetch most of the answers along with the prompts that lie between them.
_READ_AHEAD = 1 << 17
# How to stream the prompts behind a stream of rankings without fetching its answers.
_PROMPT_COLUMNS: WeakKeyDictionary[IterableDataset, Callable[[], IterableDataset]] = (
    WeakKeyDictionary()
)


class RankingError(ValueError):
    """A row or a source that is no ranking; the message names row, field and fix."""


def data_path(name: str = "") -> Path:
    """Path of a bundled data file or folder, in a checkout or an installed package.

    Raises FileNotFoundError when it is not there.
    """
    package = Path(__file__).resolve().parent
    inside, beside = package / "data", package.parent / "data"
    path = (inside if inside.is_dir() else beside) / name
    if not path.exists():
        raise FileNotFoundError(f"no bundled data at {path}")
    return path


# --- loading


def load_rankings(
    source: str | Path = "nectar_mini",
    split: str = "train",
    on_error: str = "raise",
    duplicates: str = "keep",
    *,
    half: str | None = None,
    streaming: bool = False,
) -> Dataset | IterableDataset:
    """Load rankings as a data set with the columns of `RANKING_FEATURES`, best first.

    `source` is "nectar_mini" (bundled), a JSONL, JSONL.gz or Parquet file, a folder
    with one such file per split, or a hub id such as "berkeley-nest/Nectar". `split`
    takes slices ("train[:100]"). A slice of a hub id downloads the whole split first;
    `streaming=True` fetches a row group at a time (use `.take(n)`).

    on_error    "raise" stops at the first bad row, "skip" sets bad rows aside and warns
                with their count (a stream warns at each).
    duplicates  what to do with identical answers at different ranks, after a warning
                with their count (a stream warns once): "keep" them; "drop" all copies
                but one; "tie" them. A merged answer stands where its copies' mean rank
                puts it, and ranks are counted anew.
    half        keep only rows of this half ("A" or "B" in the bundled train split).

    `finished` is true where the source does not say whether a response was cut, and an
    `id` that the source lacks is a hash of the prompt. Raises RankingError.
    """
    _check_choice("on_error", on_error, ("raise", "skip"))
    _check_choice("duplicates", duplicates, ("keep", "drop", "tie"))
    rows = _open(source, split, streaming)
    read = partial(_read_row, on_error=on_error, duplicates=duplicates, where=split)
    checked = Features(
        {**RANKING_FEATURES, "problem": Value("string"), "copies": Value("int64")}
    )
    table = map_rows(rows, read, features=checked, with_indices=True)
    if isinstance(table, Dataset):
        _warn_of_copies(table["copies"], duplicates)
        table = _set_aside(table)
    else:
        table = table.filter(partial(_accept_streamed, duplicates=duplicates))
    table = table.remove_columns(["problem", "copies"])
    if half is not None:
        return _only_half(table, half, source)
    if streaming and rows.builder_name == "parquet":
        _PROMPT_COLUMNS[table] = partial(_open, source, split, True, columns=["prompt"])
    return table


def _open(
    source: str | Path, split: str, streaming: bool, **options: Any
) -> Dataset | IterableDataset:
    """Unchecked rows: fields of the schema, or `line` and `jsonl` of a JSONL file.

    `options` go to the reader of a Parquet file.
    """
    path = data_path(source) if source == "nectar_mini" else Path(source)
    names = [re.match(r"\w*", part.strip())[0] for part in split.split("+")]
    if path.is_dir():
        files = {name: _split_file(path, name) for name in names}
    elif path.is_file():
        if names != ["train"]:
            raise RankingError(
                f"{path.name} is one file, read as split 'train', not {split!r}: name "
                "the file of the other split, or a folder that holds both"
            )
        files = {"train": path}
    elif str(source).endswith(_SUFFIXES):
        raise RankingError(f"no such file: {source}")
    else:
        return _open_hub(str(source), split, streaming, **options)
    if all(file.suffix == ".parquet" for file in files.values()):
        options["data_files"] = {name: str(file) for name, file in files.items()}
        return _load_dataset("parquet", split, streaming, **options)
    return _open_jsonl(files, split, streaming)


def _open_hub(
    source: str, split: str, streaming: bool, **options: Any
) -> Dataset | IterableDataset:
    """Rows of a hub id, or an error that says how to do without the hub."""
    if streaming:
        options["storage_options"] = {"hf": {"block_size": _READ_AHEAD}}
    try:
        return _load_dataset(source, split, streaming, **options)
    except (OSError, HFValidationError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise RankingError(
            f"{source!r} is no file or folder here, and the hub does not give it out "
            f"({reason:.300}). Check the spelling and the network. Or download its "
            "Parquet or JSONL file elsewhere and give the path here, or use the bundled "
            "'nectar_mini'"
        ) from None


def _load_dataset(
    source: str, split: str, streaming: bool, **options: Any
) -> Dataset | IterableDataset:
    rows = load_dataset(source, split=split, streaming=streaming, **options)
    # One row group after the other. Otherwise pyarrow reads on in the background, 30 MB
    # for the first row, and a program that ends meanwhile hangs at its exit.
    return rows.reshard() if streaming else rows


def _split_file(folder: Path, name: str) -> Path:
    for suffix in _SUFFIXES:
        if (file := folder / f"{name}{suffix}").is_file():
            return file
    wanted = ", ".join(f"{name}{suffix}" for suffix in _SUFFIXES)
    raise RankingError(f"split {name!r}: no file {wanted} in {folder}")


def _open_jsonl(
    files: dict[str, Path], split: str, streaming: bool
) -> Dataset | IterableDataset:
    if streaming:
        if set(files) != {split}:
            raise RankingError(f"a stream takes a plain split, not {split!r}: .take(n)")
        return IterableDataset.from_generator(
            _lines, features=_LINE_FEATURES, gen_kwargs={"path": files[split]}
        )
    lines = {name: list(_lines(path)) for name, path in files.items()}
    sizes = {name: len(rows) for name, rows in lines.items()}
    parts = ReadInstruction.from_spec(split).to_absolute(sizes)
    chosen = [lines[part.splitname][part.from_ : part.to] for part in parts]
    if not any(chosen):
        held = ", ".join(f"{files[name].name} holds {sizes[name]}" for name in files)
        raise RankingError(f"split {split!r} is empty: {held} rows")
    return Dataset.from_list(list(itertools.chain(*chosen)), features=_LINE_FEATURES)


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rb") as file:
        for number, text in enumerate(file, start=1):
            if text.strip():
                yield {"line": number, "jsonl": text}


def map_rows(table: Dataset | IterableDataset, function, **options):
    """`table.map` replacing all columns, the same for a table and a stream.

    Uncached, and with a progress bar only from 10,000 rows on.
    """
    columns = table.column_names or list(next(iter(table)))
    if isinstance(table, IterableDataset):
        return table.map(function, remove_columns=columns, **options)
    quiet = len(table) < 10_000 and not are_progress_bars_disabled()
    if quiet:
        disable_progress_bars()
    try:
        # A cached result would outlive a change in the code of this module.
        options["load_from_cache_file"] = False
        return table.map(function, remove_columns=columns, **options)
    finally:
        if quiet:
            enable_progress_bars()


def _set_aside(table: Dataset) -> Dataset:
    problems = table["problem"]
    good = [i for i, problem in enumerate(problems) if problem is None]
    if len(good) == len(table):
        return table
    first = next(problem for problem in problems if problem is not None)
    warnings.warn(
        f"set aside {len(table) - len(good)} of {len(table)} rows; the first: {first}",
        stacklevel=3,
    )
    return table.select(good)


def _warn_of_copies(copies: list[int], duplicates: str) -> None:
    rows = sum(count > 0 for count in copies)
    if rows:
        done = {"keep": "kept", "drop": "dropped", "tie": "tied"}[duplicates]
        warnings.warn(
            f"{rows} of {len(copies)} rows hold identical answers at different ranks; "
            f"{sum(copies)} copies {done} (duplicates='keep', 'drop' or 'tie')",
            stacklevel=3,
        )


def _accept_streamed(row: dict[str, Any], duplicates: str) -> bool:
    """Whether a streamed row is good; warns, as nothing can be counted in advance."""
    if row["problem"] is not None:
        warnings.warn(f"set aside {row['problem']}", stacklevel=2)
        return False
    if row["copies"]:
        # One text for all rows: Python shows it once.
        warnings.warn(
            "some rows hold identical answers at different ranks "
            f"(duplicates={duplicates!r})",
            stacklevel=2,
        )
    return True


def _only_half(
    table: Dataset | IterableDataset, half: str, source: str | Path
) -> Dataset | IterableDataset:
    if isinstance(table, IterableDataset):
        return table.filter(lambda row: row["half"] == half)
    rows = [i for i, value in enumerate(table["half"]) if value == half]
    if not rows:
        raise RankingError(f"no row of {source} is in half {half!r}")
    return table.select(rows)


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r}: expected one of {', '.join(choices)}")


def read_rows(
    source: str | Path = "nectar_mini",
    split: str = "train",
    limit: int | None = None,
) -> list[dict[str, Any]]:
    """Rows of the Nectar schema as stored: answers in their own order, ranks or none.

    `source` and `split` as for `load_rankings`; `limit` takes the first rows (None: all).
    An `id` that the source lacks is a hash of the prompt, as there, and one that is no
    text becomes text. Raises RankingError, ValueError for a negative limit.
    """
    if limit is not None and limit < 0:
        raise ValueError(f"limit={limit}: expected 0 or more, or None for all rows")
    table = _open(source, split, streaming=False)
    if limit is not None:
        table = table.select(range(min(limit, len(table))))
    return [_with_id(_stored(row)) for row in table]


def _stored(row: dict[str, Any]) -> dict[str, Any]:
    """A row's own fields; an error names the line that holds it."""
    if "jsonl" not in row:
        return row
    try:
        return _parse_line(row["jsonl"])
    except RankingError as error:
        raise RankingError(f"line {row['line']}: {error}") from None


def _with_id(row: dict[str, Any]) -> dict[str, Any]:
    """A row whose `id` is text; unchanged where nothing tells what it would be."""
    prompt = row.get("prompt")
    if row.get("id") or isinstance(prompt, str):
        return {"id": None, **row} | {"id": _id_of(row)}
    return row


# --- one row


def _read_row(
    row: dict[str, Any], index: int, on_error: str, duplicates: str, where: str
) -> dict[str, Any]:
    """A checked row, with its `problem` (or None) and how many answers are `copies`."""
    name = f"line {row['line']}" if "jsonl" in row else f"row {index} of {where!r}"
    try:
        row = _parse_line(row["jsonl"]) if "jsonl" in row else row
        name += f" (id {row['id']!r})" if row.get("id") else ""
        return _to_ranking(row, duplicates) | {"problem": None}
    except RankingError as error:
        problem = f"{name}: {error}"
        if on_error == "raise":
            raise RankingError(problem) from None
        return dict.fromkeys(RANKING_FEATURES) | {"problem": problem, "copies": 0}


def _parse_line(text: bytes) -> dict[str, Any]:
    try:
        row = json.loads(text)
        json.dumps(row, ensure_ascii=False).encode()  # finds halves of characters
    except (ValueError, RecursionError) as error:
        raise RankingError(f"not JSON ({error}); write one object a line") from None
    if not isinstance(row, dict):
        raise RankingError(f"expected a JSON object, got {_type(row)}")
    return row


def _to_ranking(row: dict[str, Any], duplicates: str) -> dict[str, Any]:
    messages = _check_prompt(row.get("prompt"))
    answers, copies = _merge_copies(_check_answers(row.get("answers")), duplicates)
    return {
        "id": _id_of(row),
        "prompt": messages,
        "responses": [answer["answer"] for answer in answers],
        "models": [answer["model"] for answer in answers],
        "finished": [answer.get("finished") is not False for answer in answers],
        "ranks": [float(answer["rank"]) for answer in answers],
        "source": _check_source(row.get("source")),
        "turns": sum(message["role"] == "user" for message in messages),
        "good_natured": _check_optional(row, "good_natured", bool),
        "half": _check_optional(row, "half", str),
        "copies": copies,
    }


def _id_of(row: dict[str, Any]) -> str:
    return str(row.get("id") or _hash(row["prompt"]))


def _hash(prompt: str) -> str:
    return hashlib.sha256(prompt.encode()).hexdigest()[:12]


def _check_source(source: Any) -> list[str]:
    names = [source] if isinstance(source, str) else source or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise RankingError(f"source: expected a list of names, got {_type(source)}")
    return names


def _check_optional(row: dict[str, Any], field: str, kind: type) -> Any:
    value = row.get(field)
    if not isinstance(value, kind | None):
        raise RankingError(
            f"{field}: expected {kind.__name__} or nothing, got {_type(value)}"
        )
    return value


def _check_prompt(prompt: Any) -> list[Message]:
    if not isinstance(prompt, str):
        raise RankingError(f"prompt: expected a transcript (text), got {_type(prompt)}")
    try:
        messages = transcript_to_messages(prompt)
    except ValueError as error:
        raise RankingError(f"prompt: {error}; append that mark") from None
    if messages[-1]["role"] != "user":
        raise RankingError(
            "prompt: the assistant turn at its end already has text or follows no "
            "user turn; cut the prompt after '\\n\\nAssistant: '"
        )
    return messages


def _check_answers(answers: Any) -> list[dict[str, Any]]:
    """The answers sorted by rank, after checking that they are a ranking."""
    if not isinstance(answers, list) or len(answers) < 2:
        what = f"{len(answers)}" if isinstance(answers, list) else _type(answers)
        raise RankingError(f"answers: expected a list of at least two, got {what}")
    for i, answer in enumerate(answers):
        _check_answer(answer, f"answers[{i}]")
    ranks = [answer["rank"] for answer in answers]
    for i, rank in enumerate(ranks):
        if rank in ranks[:i]:
            raise RankingError(
                f"answers[{i}].rank: {rank} is tied with answers[{ranks.index(rank)}]"
                "; break the tie or leave one of the two out"
            )
    if sorted(ranks) != list(range(1, len(ranks) + 1)):
        got = ", ".join(str(rank) for rank in ranks)
        raise RankingError(
            f"answers.rank: got {got}, expected each of 1 to {len(ranks)} once (1 is "
            "best); renumber them in order"
        )
    return sorted(answers, key=lambda answer: answer["rank"])


def _check_answer(answer: Any, name: str) -> None:
    if not isinstance(answer, dict):
        raise RankingError(f"{name}: expected an object, got {_type(answer)}")
    for field in ("answer", "model"):
        if not isinstance(answer.get(field), str):
            got = _type(answer.get(field))
            raise RankingError(f"{name}.{field}: expected text, got {got}; add it")
    if not answer["answer"].strip():
        raise RankingError(f"{name}.answer: empty; leave it out and renumber the rest")
    rank = answer.get("rank")
    if isinstance(rank, bool) or not isinstance(rank, int | float):
        raise RankingError(
            f"{name}.rank: expected a number, got {_type(rank)}; rank 1 is the best"
        )
    _check_optional(answer, "finished", bool)


def _type(value: Any) -> str:
    return "nothing" if value is None else f"{type(value).__name__} {value!r:.40}"


def _merge_copies(
    answers: list[dict[str, Any]], duplicates: str
) -> tuple[list[dict[str, Any]], int]:
    """Answers with identical ones merged as `duplicates` says, and how many copies.

    A group of copies stands where its mean rank puts it among the others (the better
    best rank decides between equal means), so that different texts never tie.
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    for answer in answers:
        groups.setdefault(answer["answer"].strip(), []).append(answer)
    copies = len(answers) - len(groups)
    if duplicates == "keep" or copies == 0:
        return answers, copies
    if len(groups) == 1:
        raise RankingError("answers: all identical, which is no ranking; skip the row")
    merged: list[dict[str, Any]] = []
    for group in sorted(groups.values(), key=_mean_then_best):
        place = len(merged) + 1
        kept = group[:1] if duplicates == "drop" else group
        merged += [answer | {"rank": place} for answer in kept]
    return merged, copies


def _mean_then_best(group: list[dict[str, Any]]) -> tuple[float, float]:
    ranks = [answer["rank"] for answer in group]
    return sum(ranks) / len(ranks), min(ranks)


# --- splitting and pairs


def split_by_prompt(
    dataset: Dataset | IterableDataset, test_size: float | int, seed: int
) -> DatasetDict | IterableDatasetDict:
    """Split rows into "train" and "test" so that no prompt is on both sides.

    Prompts that differ only in case, spacing or punctuation count as one. `test_size`
    is a share (float) or a number of rows (int); the test side gets at least that many,
    and more only by the size of its last group. Prompts go there in the order of their
    hashes under `seed`: the order of rows does not matter, and a few rows more or less
    leave nearly all others on their side. Raises ValueError when a side is empty.

    A stream gives two streams, after one pass over its prompts that keeps 8 bytes a
    row. From a Parquet file, here or on the hub, the pass reads the prompt column only,
    so rows that will be set aside for their answers count there as well.
    """
    streaming = isinstance(dataset, IterableDataset)
    prompts = _stream_prompts(dataset) if streaming else dataset["prompt"]
    bar = tqdm(prompts, "reading prompts", unit=" rows", delay=5)
    keys = np.fromiter((_prompt_key(prompt, seed) for prompt in bar), np.uint64)
    last = _last_test_key(keys, test_size)
    if streaming:
        keep = partial(dataset.filter, input_columns="prompt")
        side = partial(_is_on_side, seed=seed, last=last)
        return IterableDatasetDict(
            train=keep(partial(side, test=False)), test=keep(partial(side, test=True))
        )
    train, test = np.flatnonzero(keys > last), np.flatnonzero(keys <= last)
    return DatasetDict(train=dataset.select(train), test=dataset.select(test))


def without_prompts(
    dataset: Dataset | IterableDataset, held_out: Dataset
) -> Dataset | IterableDataset:
    """The rows whose prompt is not in `held_out`, compared as by `split_by_prompt`."""
    keys = {_prompt_key(prompt, 0) for prompt in held_out["prompt"]}
    return dataset.filter(partial(_is_new, keys=keys), input_columns="prompt")


def _is_new(prompt: list[Message], keys: set[int]) -> bool:
    return _prompt_key(prompt, 0) not in keys


def _stream_prompts(stream: IterableDataset) -> Iterator[list[Message]]:
    """Prompts of a stream, from its prompt column alone if that can be had."""
    if (open_column := _PROMPT_COLUMNS.get(stream)) is None:
        yield from (row["prompt"] for row in stream.select_columns("prompt"))
        return
    for row in open_column():
        try:
            yield _check_prompt(row["prompt"])
        except RankingError:  # told when the row itself is read
            continue


def _prompt_key(prompt: list[Message], seed: int) -> int:
    """A hash of 64 bits: two prompts that share one by chance only share their side."""
    text = json.dumps([int(seed), *_normalised(prompt)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())


def _last_test_key(keys: np.ndarray, test_size: float | int) -> int:
    """The largest key on the test side, which takes keys in order until it is full."""
    wanted = test_size * len(keys) if isinstance(test_size, float) else test_size
    order, count = np.sort(keys), math.ceil(wanted)
    if not 0 < count <= len(keys) or order[count - 1] == order[-1]:
        raise ValueError(f"test_size={test_size} leaves one side of {len(keys)} empty")
    return int(order[count - 1])


def _is_on_side(prompt: list[Message], seed: int, last: int, test: bool) -> bool:
    return (_prompt_key(prompt, seed) <= last) == test


def _normalised(messages: list[Message]) -> tuple[str, ...]:
    """Letters and digits of each turn in lower case (the rule Nectar was made with)."""
    turns = []
    for message in messages:
        text = message["content"].casefold()
        turns.append(re.sub(r"[\W_]+", "", text) or text)
    return (messages[0]["role"], *turns)


def to_preference_pairs(
    dataset: Dataset | IterableDataset, pairs: str | int = "all", seed: int = 0
) -> Dataset | IterableDataset:
    """Rankings as pairs in TRL's conversational preference format.

    `pairs` per row: "all" (K(K−1)/2 of them), "adjacent" (K−1), "best_worst" (one), or
    a number drawn at random without repeats. Answers of equal rank or equal text hold
    no preference and are not paired. Columns `prompt`, `chosen`, `rejected` are lists
    of messages. Raises ValueError on another `pairs`.
    """
    if not isinstance(pairs, int):
        _check_choice("pairs", pairs, ("all", "adjacent", "best_worst"))
    elif pairs < 1:
        raise ValueError(f"pairs={pairs}: expected at least one pair a row")
    expand = partial(_expand_rows, pairs=pairs, seed=seed)
    return map_rows(
        dataset, expand, features=PAIR_FEATURES, batched=True, with_indices=True
    )


def _expand_rows(
    batch: dict[str, list], indices: list[int], pairs: str | int, seed: int
) -> dict[str, list]:
    """One batch of rows as one longer batch of pairs."""
    rows: dict[str, list] = {"prompt": [], "chosen": [], "rejected": []}
    fields = (batch["prompt"], batch["responses"], batch["ranks"], indices)
    for prompt, responses, ranks, index in zip(*fields, strict=True):
        rng = np.random.default_rng([seed, index])
        for i, j in _choose_pairs(responses, ranks, pairs, rng):
            rows["prompt"].append(prompt)
            rows["chosen"].append([{"role": "assistant", "content": responses[i]}])
            rows["rejected"].append([{"role": "assistant", "content": responses[j]}])
    return rows


def _choose_pairs(
    responses: list[str],
    ranks: list[float],
    pairs: str | int,
    rng: np.random.Generator,
) -> list[tuple[int, int]]:
    """Indices (better, worse) into the responses, which stand best first."""
    last = len(responses) - 1
    everything = list(itertools.combinations(range(last + 1), 2))
    candidates = {
        "adjacent": list(itertools.pairwise(range(last + 1))),
        "best_worst": [(0, last)],
    }.get(pairs, everything)
    valid = [
        (i, j)
        for i, j in candidates
        if ranks[i] != ranks[j] and responses[i].strip() != responses[j].strip()
    ]
    if isinstance(pairs, int):
        drawn = rng.choice(len(valid), size=min(pairs, len(valid)), replace=False)
        valid = [valid[i] for i in sorted(drawn)]
    return valid
