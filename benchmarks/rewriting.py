"""Paraphrase and translation written by a larger model beforehand, as the attacks of `saeguard attack` send them.

    python benchmarks/rewriting.py GUARDRAIL [GUARDRAIL ...] [options of saeguard attack]

`rewritten.jsonl` beside this file has a paraphrase and translations of every question of the starter set on astronomy
that SmolLM2 knows, and of four questions of each other domain, written one by one by a large language model after the
prompts that the attacks send. They are served at an endpoint of this machine, and the real attacks run through it, on
all questions, dev and test. Writes the card (rewriting.json, unless --out is given), then prints the blocked questions
that came back or did not trigger, with the statistic over its threshold. A question that the file lacks ends the
attack with an error that names it.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from saeguard.attacks.attack import CLEAN, NO_QUESTION
from saeguard.attacks.card import read_card
from saeguard.attacks.rewriting import PARAPHRASE, TRANSLATE
from saeguard.attacks.success import Blocked, Pair, right
from saeguard.cli.main import main as saeguard
from saeguard.corpus import read_rows
from saeguard.evaluation.task import Record

WRITTEN = Path(__file__).with_name("rewritten.jsonl")
ALL = ("--split", "all", "--limit", "140", "--others", "4", "--keep-text")


class Handler(BaseHTTPRequestHandler):
    """Says what was `written` for exactly the prompt it is sent."""

    def __init__(self, written: Mapping[str, str], *parts: Any) -> None:
        self.written = written
        super().__init__(*parts)

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"][0]["content"]
        if asked not in self.written:
            does, _, question = asked.partition("\n\n")
            self.send_error(404, f"{WRITTEN.name} has no answer to {does.partition('.')[0]!r} for {question!r}")
            return
        raw = json.dumps({"choices": [{"message": {"role": "assistant", "content": self.written[asked]}}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, *parts: Any) -> None:
        """Nothing is logged."""


@contextmanager
def endpoint(written: Mapping[str, str]) -> Iterator[str]:
    """The address of an endpoint that is there until the block ends."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, written)) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/v1"
        finally:
            server.shutdown()


def got_through(card: Mapping[str, Any]) -> Iterator[str]:
    """A line for each blocked question that an attack brought back, or that does not trigger under it."""
    found: dict[tuple[str, str], dict[str, Record]] = defaultdict(dict)
    for row in card["records"]:
        record = Record(**{field.name: row[field.name] for field in fields(Record)})
        found[row["attack"], row["subject"]][record.item] = record
    for attack, name in ((row["attack"], row["subject"]) for row in card["rows"]):
        clean, pair = (Pair(found[one, "unguarded"], found[one, name]) for one in (CLEAN.name, attack))
        for item in Blocked.of(clean, found[NO_QUESTION.name, "unguarded"]).blocked:
            its, back = pair.subject[item], right(pair.unguarded, item) and right(pair.subject, item)
            if back or not its.triggered:
                ratio = (its.statistic or 0) / card["guardrails"][name][0]["threshold"]
                known = "came back" if back else "model right" if right(pair.unguarded, item) else "model wrong"
                yield f"{attack}, {name}: {known}, {ratio:.2f}: {its.texts['prompt'].splitlines()[1]}"


def main() -> int:
    """Serve, attack, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("guardrail", nargs="+")
    parser.add_argument("--out", default="rewriting.json")
    args, others = parser.parse_known_args()
    rows = list(read_rows(WRITTEN))
    languages = [name for name in rows[0] if name not in ("question", "paraphrase")]
    written = {PARAPHRASE.format(question=row["question"]): row["paraphrase"] for row in rows} | {
        TRANSLATE.format(language=name, question=row["question"]): row[name] for row in rows for name in languages
    }
    names = ["paraphrase", *(f"translation-{name.lower()}" for name in languages)]
    with endpoint(written) as url:
        told = ["--guardrail", *args.guardrail, "--endpoint", url, "--endpoint-model", WRITTEN.stem, "--out", args.out]
        status = saeguard(["attack", *names, *told, "--languages", *languages, *ALL, *others])
    if not status:
        print("\n".join(got_through(read_card(args.out))))
    return status


if __name__ == "__main__":
    sys.exit(main())
