"""A comparison on MT-Bench's questions as JSON, Markdown and one page of HTML.

Knows how figures become sentences, tables and pictures, and how answers stand side by
side. Does not know how they were asked for or counted. Whatever a model, a judge or a
file said is escaped, and the page forbids scripts and outside addresses besides.
"""

import base64
import html
import io
import json
import math
import textwrap
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from starling_lib import plots
from starling_lib.bench_files import QuestionId, answer_turns
from starling_lib.bench_tables import (
    Comparison,
    Tables,
    comparison_tables,
    is_reward,
)
from starling_lib.journal import Row
from starling_lib.report_files import plain, table_records, write_together

LEVEL = 0.05  # below this p-value a difference is called more than noise


@dataclass(frozen=True)
class BenchReport:
    """A report in a folder; it shows its figures, without the answers, in Jupyter.

    `report` is the content of `report.json`; `judgments` (by judge) and `pairs` are the
    frames that it was counted from.
    """

    folder: Path
    report: dict[str, Any] = field(repr=False)
    judgments: dict[str, pd.DataFrame] = field(repr=False)
    pairs: pd.DataFrame | None = field(repr=False)
    summary: str = field(repr=False)  # HTML

    def _repr_html_(self) -> str:
        return self.summary


@dataclass(frozen=True)
class Section:
    """A heading, what to know about it, tables of texts by caption, and pictures."""

    heading: str
    notes: list[str] = field(default_factory=list)
    tables: dict[str, pd.DataFrame] = field(default_factory=dict)
    figures: dict[str, Figure] = field(default_factory=dict)


def write_report(found: Comparison, folder: Path) -> BenchReport:
    """Write `report.json`, `report.md` and `report.html` into a folder, all or none."""
    tables = comparison_tables(found)
    short = in_short(found, tables)
    report = report_data(found, tables, short)
    sections = report_sections(found, tables, short)
    title = f"{', '.join(found.answers)} on {len(found.questions)} questions"
    summary = html_sections(sections)
    page = html_page(title, summary + html_answers(found))
    # Half a surrogate pair, which JSON can hold and UTF-8 cannot, is shown by number.
    data = json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False)
    texts = {
        "report.json": data.encode("utf-8", "backslashreplace"),
        "report.md": markdown(title, sections).encode("utf-8", "backslashreplace"),
        "report.html": page.encode("utf-8", "xmlcharrefreplace"),
    }
    writers = {
        name: lambda path, text=text: path.write_bytes(text)
        for name, text in texts.items()
    }
    write_together(folder, writers)
    page_file = html.escape(str(folder / "report.html"))
    where = f"<p>Answers side by side: <code>{page_file}</code></p>"
    shown = f'{STYLE}<div class="bench">{summary}{where}</div>'
    return BenchReport(folder, report, found.singles, found.pairs, shown)


def report_data(found: Comparison, tables: Tables, short: list[str]) -> dict[str, Any]:
    """All figures as JSON has them: tables are lists of rows, null is not finite."""
    data: dict[str, Any] = {"settings": found.settings, "in_short": short}
    for name, value in vars(tables).items():
        if isinstance(value, pd.DataFrame):
            data[name] = table_records(value)
        elif isinstance(value, list):
            data[name] = value
        elif name == "position" or value is None:
            data[name] = value and {k: plain(v) for k, v in value.items()}
        else:
            data[name] = {judge: table_records(part) for judge, part in value.items()}
    return data


# --- sentences


def in_short(found: Comparison, tables: Tables) -> list[str]:
    """What the figures say, one sentence a finding; judged by whom comes first."""
    lines = []
    for judge, judgments in found.singles.items():
        digits = 3 if is_reward(judgments) else 2
        if judge not in tables.scores:
            lines.append(f"{judge}: every judgment failed, so there is no score.")
            continue
        overall = tables.scores[judge].xs("overall", level="part")
        said = [f"{model} {row.score:.{digits}f}" for model, row in overall.iterrows()]
        lines.append(f"{judge} gives on average {', '.join(said)}.")
        for (a, b, part), row in tables.differences[judge].iterrows():
            if part == "overall":
                lines.append(f"{judge}: {a} − {b} = {_verdict(row, digits)}")
    lines += [*_agreement_lines(tables), *tables.left_out]
    for (judge, kind), row in tables.failures.iterrows():
        if row["failed"]:
            lines.append(
                f"{row['failed']} of {row['judgments']} judgments ({kind}) by {judge} "
                "failed and count in no score."
            )
    return lines


def _verdict(row: pd.Series, digits: int) -> str:
    """A difference with its interval and whether it could be noise."""
    count, p = int(row["questions"]), row["p_value"]
    if count < 2:
        return f"{row['difference']:+.{digits}f} on one question, which proves nothing."
    verdict = (
        "more than the choice of questions explains"
        if p < LEVEL
        else f"could be noise on {count} questions"
    )
    size = _interval(row, "difference", digits, signed=True)
    return f"{size}, p {_p(p)}: {verdict}."


def _agreement_lines(tables: Tables) -> Iterator[str]:
    if tables.agreement is None:
        return
    for (one, other), part in tables.agreement.groupby(level=[0, 1], sort=False):
        row = part.xs("without", level="ties").iloc[-1]  # of all turns
        if row["n"]:
            share = _interval(row, "agreement", 2)
            yield (
                f"{one} and {other} prefer the same model in {share} of the "
                f"{row['n']:.0f} cases that both decide (by guessing: 0.50)."
            )


def _interval(row: pd.Series, name: str, digits: int, signed: bool = False) -> str:
    """A figure with its ends; the figure alone where it has none."""
    sign = "+" if signed else ""
    low, high = (row.get(end, math.nan) for end in _ends_of(name))
    text = f"{row[name]:{sign}.{digits}f}"
    if pd.isna(row[name]):
        return "–"
    if pd.isna(low) or pd.isna(high):
        return text
    return f"{text} [{low:{sign}.{digits}f}, {high:{sign}.{digits}f}]"


def _ends_of(name: str) -> tuple[str, str]:
    """The columns of a figure's interval, as the tables call them."""
    own = name.endswith("_rate") or name == "kappa"
    return (f"{name}_low", f"{name}_high") if own else ("low", "high")


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"= {value:.3f}"


# --- sections


def report_sections(
    found: Comparison, tables: Tables, short: list[str]
) -> list[Section]:
    """The report in order, without the answers; sections with nothing are left out."""
    sections = [Section("In short", short)]
    for judge in tables.scores:
        sections.append(_score_section(found, tables, judge))
    if tables.wins:
        wins = {judge: _win_table(table) for judge, table in tables.wins.items()}
        sections.append(Section("Wins, ties and losses", [WINS], wins))
    if tables.ratings is not None:
        sections.append(_rating_section(tables.ratings))
    if tables.swaps is not None:
        sections.append(_order_section(found, tables))
    if tables.agreement is not None:
        table = {"": _agreement_table(tables.agreement)}
        sections.append(Section("Do the judges agree?", [AGREEMENT], table))
    lengths, failures = _length_table(tables.lengths), tables.failures.reset_index()
    sections.append(Section("Length of the answers", [LENGTHS], {"": lengths}))
    sections.append(Section("Failed judgments", [FAILURES], {"": failures.astype(str)}))
    settings = pd.DataFrame(_flat(found.settings), columns=["setting", "value"])
    return [*sections, Section("Settings", [], {"": settings})]


SCORES = (
    "Means with 95 % intervals: how far they could move with other questions of the same "
    "kind. They say nothing about another judge."
)
REWARDS = (
    "A reward has no scale from 1 to 10 and its own zero: only differences mean "
    "something, and only for this reward model."
)
DIFFERENCES = (
    "Differences are paired by question; p is from a permutation test for each line "
    "alone: of twenty lines without any difference, about one has p < 0.05."
)
WINS = (
    "From scores of single answers (ratings within 0.1 tie), or from pairs judged in "
    "both orders, where a conflict is a tie. The adjusted rate counts a tie half."
)
RATINGS = (
    "Bradley-Terry strengths on Elo's scale, 1000 on average, fitted to all pairs; one "
    "virtual tie a pair of models keeps the rating of one that never lost finite."
)
AGREEMENT = (
    "Whether two judges prefer the same model, with and without ties. κ takes off what "
    "chance would give."
)
LENGTHS = (
    "Judges often favour length, reward models too. Cut: ended by the token limit."
)
FAILURES = "Failed judgments are in no score and no win; they are not guessed."


def _score_section(found: Comparison, tables: Tables, judge: str) -> Section:
    """Scores and differences by one judge."""
    reward = is_reward(found.singles[judge])
    digits, unit = (3, "reward") if reward else (2, "points")
    scores, differences = tables.scores[judge], tables.differences[judge]
    shown = {"Mean scores": _score_table(scores, digits)}
    figures = {}
    parts = {question["category"] for question in found.questions}
    categories = [part for part in scores.index.unique("part") if part in parts]
    if not reward and categories:
        figures["Mean score by category"] = plots.category_scores(scores, categories)
    if not reward and len(categories) > 2:  # fewer make no polygon
        profile = scores["score"].unstack("part").reindex(scores.index.unique("model"))
        figures["Profile"] = plots.category_radar(profile, categories)
    if not differences.empty:
        shown["Differences"] = _difference_table(differences, digits)
        figures["Differences"] = plots.score_differences(differences, unit)
    if judge in tables.spread:
        spread = tables.spread[judge].round(digits).reset_index().astype(str)
        shown["Spread when the judge is asked again"] = spread
    notes = [SCORES, *[REWARDS] * reward, *[DIFFERENCES] * (not differences.empty)]
    return Section(f"Scores by {judge}", notes, shown, figures)


def _score_table(scores: pd.DataFrame, digits: int) -> pd.DataFrame:
    """One row a part, one column a model: "6.20 [5.80, 6.60]"."""
    texts = scores.apply(_interval, axis=1, args=("score", digits))
    parts, models = scores.index.unique("part"), scores.index.unique("model")
    table = texts.unstack("model").reindex(index=parts, columns=models).fillna("–")
    return table.reset_index()


def _difference_table(differences: pd.DataFrame, digits: int) -> pd.DataFrame:
    rows = [
        {
            "part": part,
            "models": f"{a} − {b}",
            "means": f"{row.mean_a:.{digits}f}, {row.mean_b:.{digits}f}",
            "difference": _interval(row, "difference", digits, signed=True),
            "p": _p(row.p_value).removeprefix("= "),
            "questions": str(int(row.questions)),
        }
        for (a, b, part), row in differences.iterrows()
    ]
    return pd.DataFrame(rows)


def _win_table(table: pd.DataFrame) -> pd.DataFrame:
    shown = table[["n", "win", "tie", "loss", "error"]].astype(int).astype(str)
    for name in ("win_rate", "adjusted_win_rate"):
        shown[name.replace("_", " ")] = table.apply(_interval, axis=1, args=(name, 2))
    return shown.rename(columns={"error": "failed"}).reset_index()


def _rating_section(ratings: pd.DataFrame) -> Section:
    """Ratings of all models in one order."""
    shown = ratings[["model", "games"]].astype(str)
    names = ["rating", "rating_low", "rating_high"]
    low_high = ratings[names].set_axis(["rating", "low", "high"], axis=1)
    shown["rating"] = low_high.apply(_interval, axis=1, args=("rating", 0))
    figure = {"Ratings": plots.bradley_terry(ratings)}
    return Section("Ratings from pairs", [RATINGS], {"": shown}, figure)


def _order_section(found: Comparison, tables: Tables) -> Section:
    """What swapping the answers did."""
    swaps, position = tables.swaps, tables.position
    shown = pd.DataFrame(
        {
            "outcome": swaps.index,
            "pairs": swaps["n"].astype(int).astype(str),
            "share": swaps.apply(_interval, axis=1, args=("share", 2)),
        }
    )
    judge = found.pairs["judge"].iloc[0]
    note = (
        f"Each pair was shown in both orders. {position['first']} questions leaned to the "
        f"answer shown first, {position['second']} to the second (sign test that the "
        f"first is not favoured: p {_p(position['p_value'])})."
    )
    figure = {"Swap consistency": plots.swap_consistency({judge: swaps})}
    return Section("Does the order decide?", [note], {judge: shown}, figure)


def _agreement_table(agreement: pd.DataFrame) -> pd.DataFrame:
    rows = [
        {
            "judges": f"{one}, {other}",
            "turn": str(turn),
            "ties": ties,
            "votes": str(int(row.n)),
            "agreement": _interval(row, "agreement", 2),
            "by guessing": f"{row.random:.2f}",
            "κ": _interval(row, "kappa", 2),
        }
        for (one, other, turn, ties), row in agreement.iterrows()
    ]
    return pd.DataFrame(rows)


def _length_table(lengths: pd.DataFrame) -> pd.DataFrame:
    cut = [("not recorded" if pd.isna(x) else f"{x:.0%}") for x in lengths["cut"]]
    shown = {
        "model": lengths.index,
        "answers (turns)": lengths["turns"].astype(int).astype(str),
        "mean characters": lengths["characters"].map("{:.0f}".format),
        "cut": cut,
    }
    return pd.DataFrame(shown)


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested settings as lines of "models, base, seed" and a text."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}, ")
        else:
            yield f"{prefix}{name}", str(value)


# --- Markdown


def markdown(title: str, sections: list[Section]) -> str:
    """Sentences and tables; pictures and answers are in the HTML beside it."""
    blocks = [f"# {_md(title)}"]
    for section in sections:
        blocks.append(f"## {_md(section.heading)}")
        as_list = section.heading == "In short"
        notes = [("- " if as_list else "") + _md(note) for note in section.notes]
        blocks.append(("\n" if as_list else "\n\n").join(notes))
        for caption, table in section.tables.items():
            blocks += [f"**{_md(caption)}**"] * bool(caption) + [_md_table(table)]
    blocks.append("Pictures and answers side by side: `report.html`.")
    return "\n\n".join(filter(None, blocks)) + "\n"


def _md(text: Any) -> str:
    """Text on one line that Markdown shows as it is."""
    escaped = html.escape(" ".join(str(text).split()), quote=False)
    for mark in "\\`*_[]|#":
        escaped = escaped.replace(mark, f"\\{mark}")
    return escaped


def _md_table(table: pd.DataFrame) -> str:
    rows = [list(table), ["---"] * table.shape[1], *table.to_numpy().tolist()]
    rows = [row if row[0] == "---" else [_md(cell) for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


# --- HTML

STYLE = """<style>
.bench { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem }
main.bench { margin: 0 auto; padding: 0 1rem 3rem }
.bench h1 { font-size: 1.6em; margin: .5em 0 }
.bench h2 { font-size: 1.2em; margin: 1.8em 0 .4em }
.bench p, .bench li { max-width: 46rem; margin: .3em 0 }
.bench table { display: block; overflow-x: auto; border-collapse: collapse;
  margin: .6em 0 1em; font-variant-numeric: tabular-nums }
.bench caption { text-align: left; font-weight: 600; padding: .3em 0 }
.bench th, .bench td { text-align: left; vertical-align: top; padding: .25em 1em .25em 0;
  border-top: 1px solid rgba(128, 128, 128, .35); overflow-wrap: break-word }
.bench td:first-child { min-width: 6em }
.bench img { max-width: min(100%, 46rem); display: block; margin: .6em 0 }
.bench details.question { border-top: 1px solid rgba(128, 128, 128, .5); padding: .4em 0 }
.bench summary { cursor: pointer }
.bench .said { white-space: pre-wrap; overflow-wrap: anywhere }
.bench .user { border-left: 3px solid #0072B2; padding-left: .7em; margin: .8em 0 .5em;
  max-width: 60rem }
.bench .answers { display: grid; gap: 1.2em; overflow-x: auto; grid-auto-flow: column;
  grid-auto-columns: minmax(17em, 1fr) }
.bench .figures { color: #666; font-size: .9em; margin: .4em 0 }
</style>"""
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def html_page(title: str, body: str) -> str:
    """A page that needs nothing else, and whose policy lets no script run."""
    name = html.escape(title)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{name}</title>{STYLE}</head>\n"
        f'<body><main class="bench"><h1>{name}</h1>{body}</main></body></html>\n'
    )


def html_sections(sections: list[Section]) -> str:
    """The sections one after another."""
    parts = []
    for section in sections:
        parts.append(f"<h2>{html.escape(section.heading)}</h2>")
        notes = [html.escape(note) for note in section.notes]
        if section.heading == "In short":
            parts.append(f"<ul>{''.join(f'<li>{note}</li>' for note in notes)}</ul>")
        else:
            parts += [f"<p>{note}</p>" for note in notes]
        parts += [_html_table(*item) for item in section.tables.items()]
        parts += [_html_image(*item) for item in section.figures.items()]
    return "\n".join(parts)


def _html_table(caption: str, table: pd.DataFrame) -> str:
    head = "".join(f"<th>{html.escape(str(name))}</th>" for name in table)
    rows = [
        "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row)
        for row in table.to_numpy().tolist()
    ]
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    title = f"<caption>{html.escape(caption)}</caption>" if caption else ""
    return (
        f"<table>{title}<thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table>"
    )


def _html_image(alt: str, figure: Figure) -> str:
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=150)
    data = base64.b64encode(image.getvalue()).decode()
    return f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{data}">'


# --- answers side by side


def html_answers(found: Comparison) -> str:
    """Every question with all answers, folded; the first is open."""
    judgments = _judgments_by_turn(found)
    verdicts = _verdicts_by_turn(found)
    parts = []
    for number, question in enumerate(found.questions):
        body = "".join(
            _html_turn(found, question, turn, judgments, verdicts)
            for turn in range(1, len(question["turns"]) + 1)
        )
        name = html.escape(f"{question['question_id']} · {question['category']}")
        first = html.escape(
            textwrap.shorten(question["turns"][0], 90, placeholder=" …")
        )
        parts.append(
            f'<details class="question"{" open" * (number == 0)}><summary><b>{name}</b> '
            f"{first}</summary>{body}</details>"
        )
    return "\n<h2>Answers side by side</h2>\n" + "\n".join(parts)


Key = tuple[QuestionId, int]


def _judgments_by_turn(found: Comparison) -> dict[tuple, list[tuple[str, Row]]]:
    """(judge, judgment) by question, turn and model, pass by pass."""
    by_turn = defaultdict(list)
    for judge, frame in found.singles.items():
        for row in frame.astype(object).to_dict("records"):
            key = row["question_id"], row["turn"], row["model"]
            by_turn[key].append((judge, row))
    return by_turn


def _verdicts_by_turn(found: Comparison) -> dict[Key, list[str]]:
    """Sentences about pairs by question and turn."""
    by_turn = defaultdict(list)
    if found.pairs is None:
        return by_turn
    for row in found.pairs.astype(object).to_dict("records"):
        names = {"model_1": row["model_1"], "model_2": row["model_2"]}
        first, second = (
            names.get(row[f"{game}_winner"], row[f"{game}_winner"])
            for game in ("g1", "g2")
        )
        by_turn[row["question_id"], row["turn"]].append(
            f"{row['judge']} prefers, {row['model_1']} shown first: {first}; "
            f"{row['model_2']} shown first: {second}"
        )
    return by_turn


def _html_turn(
    found: Comparison,
    question: Row,
    turn: int,
    judgments: Mapping[tuple, list[tuple[str, Row]]],
    verdicts: Mapping[Key, list[str]],
) -> str:
    """What the user said, the models' answers beside each other, verdicts on pairs."""
    name = question["question_id"]
    cells = "".join(
        _html_answer(model, answers[name], turn, judgments.get((name, turn, model), []))
        for model, answers in found.answers.items()
    )
    notes = "".join(
        f'<p class="figures">{html.escape(line)}</p>'
        for line in verdicts.get((name, turn), [])
    )
    asked = html.escape(question["turns"][turn - 1])
    return (
        f'<div class="user said" dir="auto">{asked}</div>'
        f'<div class="answers">{cells}</div>{notes}'
    )


def _html_answer(
    model: str, answer: Row, turn: int, judgments: list[tuple[str, Row]]
) -> str:
    """One answer with its scores, and the judge's words folded away."""
    texts, finished = answer_turns(answer), answer.get("finished") or []
    if len(texts) < turn:
        return f"<div><b>{html.escape(model)}</b><p>no answer to this turn</p></div>"
    cut = len(finished) >= turn and not finished[turn - 1]
    figures = [_judged(judge, row) for judge, row in judgments]
    figures += [f"{len(texts[turn - 1])} characters", *["cut"] * cut]
    words = "".join(
        f"<details><summary>what {html.escape(judge)} said</summary>"
        f'<div class="said" dir="auto">{html.escape(row["judgment"])}</div></details>'
        for judge, row in judgments
        if row["judgment"]
    )
    return (
        f'<div><b>{html.escape(model)}</b><div class="said" dir="auto">'
        f"{html.escape(texts[turn - 1])}</div>"
        f'<div class="figures">{html.escape(" · ".join(figures))}</div>{words}</div>'
    )


def _judged(judge: str, row: Row) -> str:
    name = f"{judge}, pass {row['pass']}" if row["pass"] > 1 else judge
    if isinstance(row["error"], str):
        return f"{name}: failed ({row['error']})"
    return f"{name}: {row['score']:.4g}"
