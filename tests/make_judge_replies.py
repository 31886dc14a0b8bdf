"""Make data/nectar_mini/judge_replies.jsonl, the bundled log of a judge's replies.

    python tests/make_judge_replies.py [OUTPUT]

The AI assistant that ranked nectar_mini left rankings (`judgments.jsonl`), not replies.
This writes for each of them the request that `rank_responses` makes today and a reply
that says no more than is known: the declaration and the list. Every record is marked
`"reconstructed": true`; no judge saw this wording or gave these replies. Run it again
when the wording of `labeling.ranking_messages` changes.
"""

import shutil
import sys
import tempfile
from pathlib import Path

from starling_lib.chat import transcript_to_messages
from starling_lib.judges import Reply, ReplyLog
from starling_lib.labeling import (
    LETTERS,
    presentation,
    ranking_messages,
    read_jsonl,
    read_rows,
)
from starling_lib.rankings import data_path

MODEL = "assistant (reconstructed)"
SEED = 0


def reconstruct_replies(path: Path) -> int:
    """Write the log to `path` (which must not exist yet); return its number of records."""
    log = ReplyLog(path)
    rows = {row["id"]: row for row in read_rows(split="train+test")}
    for judgment in read_jsonl(data_path("nectar_mini/judgments.jsonl")):
        row = rows[judgment["id"]]
        answers, number = row["answers"], judgment["pass"]
        _, pairs = presentation(row["id"], len(answers), number, SEED)
        texts = [answer["answer"] for answer in answers]
        prompt = transcript_to_messages(row["prompt"])
        messages = ranking_messages(prompt, texts, judgment["display"], pairs)
        reply = Reply(reply_text(judgment))
        log.add(MODEL, messages, {}, number - 1, reply, reconstructed=True)
    return len(log)


def reply_text(judgment: dict) -> str:
    """The shortest reply in the requested form that says what the judgment holds."""
    a_or_not = "a" if judgment["good_natured"] else "not a"
    places = [judgment["display"].index(i) for i in judgment["ranking"]]
    letters = ", ".join(f"'{LETTERS[place]}'" for place in places)
    return f"This is {a_or_not} good natured conversation.\n\nRanking: [[{letters}]]"


if __name__ == "__main__":
    bundled = data_path("nectar_mini") / "judge_replies.jsonl"
    target = Path(sys.argv[1]) if sys.argv[1:] else bundled
    with tempfile.TemporaryDirectory() as folder:  # a log leaves a lock file beside it
        made = Path(folder) / "replies.jsonl"
        print(f"{reconstruct_replies(made)} replies in {target}")
        shutil.copyfile(made, target)
