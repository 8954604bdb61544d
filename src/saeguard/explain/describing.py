"""One-line descriptions of features by a language model behind an OpenAI-compatible endpoint.

The model is shown the contexts of a feature with the peaks marked, and is asked what they have in common. What it says
is kept row by row in a file, so that a run that was stopped asks only for what is missing.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError, HTTPError  # type: ignore[attr-defined]

from saeguard.corpus import read_rows
from saeguard.errors import CorpusError, EndpointError
from saeguard.progress import Advance

ASK = """Below are passages in which one feature of a language model is active. The token at which it is most active \
stands between << and >>. Say in one short phrase what these tokens, in their passages, have in common. Answer with \
the phrase alone.

"""
MAX_TOKENS = 60
MAX_CHARACTERS = 200
NO_KEY = "none"


@dataclass(frozen=True)
class Endpoint:
    """Where to ask: the address up to `/v1`, the name of the model there, and how patiently.

    `timeout` and `pause` (before the second attempt, doubled before each further one) are in seconds.
    """

    url: str
    model: str
    api_key: str | None = field(default=None, repr=False)
    concurrency: int = 8
    timeout: float = 60.0
    attempts: int = 4
    pause: float = 1.0


def described(
    rows: Sequence[Mapping[str, Any]], endpoint: Endpoint, kept: Path, advance: Advance = lambda rows: None
) -> dict[int, str]:
    """The model's description of each of these rows of an explanations file, by feature id. Raises `EndpointError`.

    Those in the file `kept` are not asked for again; new ones are added to it as they come.
    """
    known = _whole_rows(kept, endpoint.model)
    wanted = [row for row in rows if row["feature"] not in known]
    advance(len(rows) - len(wanted))
    # With no key at all the client would send the user's Hugging Face token to whatever address this is.
    client = InferenceClient(base_url=endpoint.url, api_key=endpoint.api_key or NO_KEY, timeout=endpoint.timeout)
    with kept.open("a", encoding="utf-8") as file, ThreadPoolExecutor(endpoint.concurrency) as pool:
        asked = {pool.submit(_ask, client, endpoint, row): row["feature"] for row in wanted}
        try:
            for done in as_completed(asked):
                feature, text = asked[done], done.result()
                known[feature] = text
                file.write(_line({"feature": feature, "by": endpoint.model, "description": text}))
                file.flush()
                advance(1)
        finally:
            pool.shutdown(cancel_futures=True)
    return {row["feature"]: known[row["feature"]] for row in rows}


def question(row: Mapping[str, Any]) -> str:
    """What the model is asked about one row."""
    passages = (f"{p['before']}<<{p['token']}>>{p['after']}" for p in row["contexts"])
    return ASK + "\n".join(f"{number}. {' '.join(text.split())}" for number, text in enumerate(passages, 1))


def _ask(client: InferenceClient, endpoint: Endpoint, row: Mapping[str, Any]) -> str:
    messages = [{"role": "user", "content": question(row)}]
    for attempt in range(1, endpoint.attempts + 1):
        try:
            answer = client.chat_completion(messages, model=endpoint.model, max_tokens=MAX_TOKENS, temperature=0.0)
            text = " ".join((answer.choices[0].message.content or "").split())[:MAX_CHARACTERS]
        except (HTTPError, OSError) as error:
            if attempt == endpoint.attempts or not _passes(error):
                raise EndpointError(_failed(endpoint, error, attempt)) from error
            time.sleep(endpoint.pause * 2 ** (attempt - 1))
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            raise EndpointError(f"{endpoint.url} answered, but not as a chat endpoint does: {error!r}") from error
        else:
            if not text:
                raise EndpointError(
                    f"{endpoint.model} at {endpoint.url} gave an empty answer on feature {row['feature']}"
                )
            return text
    raise EndpointError(f"{endpoint.attempts} attempts were allowed: expected at least 1")


def _passes(error: Exception) -> bool:
    """Whether asking again may help: not where the request itself was refused."""
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else 503
    return status in (408, 429) or status >= 500


def _failed(endpoint: Endpoint, error: Exception, attempts: int) -> str:
    times = "once" if attempts == 1 else f"{attempts} times"
    return (
        f"asked {endpoint.model} at {endpoint.url} {times}: {' '.join(str(error).split())}. What was described is "
        "kept; check the address, the model's name and the key, and run again."
    )


def _whole_rows(kept: Path, model: str) -> dict[int, str]:
    """What this model said in earlier runs. A line that a killed run left half written is taken out of the file."""
    kept.parent.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    if kept.is_file():
        with suppress(CorpusError):
            rows.extend(read_rows(kept))
    whole = kept.with_suffix(".partial")
    whole.write_text("".join(map(_line, rows)), "utf-8")
    whole.replace(kept)
    return {row["feature"]: row["description"] for row in rows if row["by"] == model}


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"
