"""How people name a published SAE, and fetching just that one from the Hugging Face hub.

OWNER/REPO                        the repository holds one SAE
OWNER/REPO:PATH, OWNER/REPO/PATH  a folder or file in it; `@REVISION` may follow the repository
gemma-scope-2b-pt-res/layer_3/width_16k/average_l0_142      the owner of well-known repositories may be left out
llama_scope_lxr_8x:l3r_8x         the names SAELens gives Llama Scope
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, cast

from saeguard.errors import SAEError

WEIGHTS = {".npz", ".safetensors", ".pt", ".pth"}
OWNERS = {"gemma-scope-": "google", "SAE-Res-": "Qwen", "Llama3_1-8B-Base-LX": "fnlp", "sae-llama-": "EleutherAI"}
LLAMA_SCOPE = re.compile(r"llama_scope_lx([rma])_(8|32)x[:/]l(\d+)\1_\2x")
REFERENCE = re.compile(r"(?P<owner>[\w.-]+)/(?P<repo>[\w.-]+)(?:@(?P<revision>[\w.-]+))?(?:[:/](?P<path>.+))?")


@dataclass(frozen=True)
class Reference:
    """A repository on the hub, a revision (None: the newest) and a folder or file in it ("": the root)."""

    repo: str
    path: str = ""
    revision: str | None = None

    @classmethod
    def parse(cls, text: str) -> Reference:
        """Read any of the forms above. Raises `SAEError`."""
        if named := LLAMA_SCOPE.fullmatch(text):
            site, times, layer = named[1].upper(), named[2], named[3]
            return cls(f"fnlp/Llama3_1-8B-Base-LX{site}-{times}x", f"Llama3_1-8B-Base-L{layer}{site}-{times}x")
        for prefix, owner in OWNERS.items():
            if text.startswith(prefix):
                text = f"{owner}/{text}"
        found = REFERENCE.fullmatch(text)
        if found is None or text.startswith((".", "/", "~")):
            raise SAEError(
                f"{text} is neither a folder, a file nor a hub id such as OWNER/REPO, OWNER/REPO:FOLDER or "
                "gemma-scope-2b-pt-res/layer_3/width_16k/average_l0_142. For the names that SAELens gives "
                "(RELEASE:ID): pip install 'saeguard[saelens]'"
            )
        return cls(f"{found['owner']}/{found['repo']}", (found["path"] or "").strip("/"), found["revision"])

    def patterns(self) -> dict[str, Any]:
        """Which files of the repository to download: those of the folder, or the file and the JSON beside it.

        A few folders are named like a file, so that what looks like a file may be either.

        Without a path the files at the root, but never every layer of a family that keeps them there.
        """
        path = Path(self.path)
        if not self.path:
            return {"ignore_patterns": ["*/*", "layer*.sae.pt"]}
        if path.suffix in WEIGHTS:
            return {"allow_patterns": [self.path, f"{self.path}/*", str(path.parent / "*.json")]}
        return {"allow_patterns": [f"{self.path}/*"]}

    def fetch(self) -> Path:
        """Download what the reference names, and nothing else of the repository; the folder or file."""
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError

        # Its base is the HTTP library's error, which a broken proxy or transfer raises as it is.
        http_error = cast(type[Exception], HfHubHTTPError.__mro__[1])
        try:
            root = Path(snapshot_download(self.repo, revision=self.revision, **self.patterns()))
        except (HfHubHTTPError, HFValidationError, http_error, OSError) as error:
            raise SAEError(
                f"cannot fetch {self.repo} from the Hugging Face hub: {self._advice(_cause(error))} "
                f"({type(error).__name__})"
            ) from error
        if not (root / self.path).exists():
            raise SAEError(f"{self.repo} has no {self.path}.{self._nearest()}")
        return root / self.path

    def _advice(self, error: Exception) -> str:
        """What happened, and what to do about it."""
        from huggingface_hub.errors import (
            GatedRepoError,
            HfHubHTTPError,
            HFValidationError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )

        status = getattr(error.response, "status_code", None) if isinstance(error, HfHubHTTPError) else None
        if isinstance(error, GatedRepoError) or status == 403:
            return (
                "its licence must be accepted first. Accept it at "
                f"https://huggingface.co/{self.repo}, then log in: hf auth login."
            )
        if isinstance(error, RepositoryNotFoundError) or status == 401:
            return (
                "there is no such repository, or it is private. Correct the name, or log in to an account that may "
                "read it: hf auth login. For the names that SAELens gives: pip install 'saeguard[saelens]'."
            )
        if isinstance(error, RevisionNotFoundError):
            return f"it has no revision {self.revision}. Leave the revision out for the newest."
        if isinstance(error, HFValidationError):
            return f"that is no name of a repository: {error}"
        if status is not None:
            return f"the hub answered with status {status}. Try again later."
        return (
            f"it cannot be reached, and what is asked for is not in the cache: {error}. Check the connection and "
            "whether HF_HUB_OFFLINE is set, or fetch it elsewhere and give the folder's path."
        )

    def _nearest(self) -> str:
        """What the repository has that is named much alike, where the hub can be asked."""
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

        try:
            files = HfApi().list_repo_files(self.repo, revision=self.revision)
        except (HfHubHTTPError, OfflineModeIsEnabled, OSError):
            return ""
        folders = sorted({str(Path(file).parent) for file in files} | set(files))
        return f" Nearest: {', '.join(get_close_matches(self.path, folders, n=4, cutoff=0.3)) or folders[:4]}"


def _cause(error: Exception) -> Exception:
    """What the hub answered, where its client only says that the cache has no copy."""
    from huggingface_hub.errors import HfHubHTTPError

    return error.__cause__ if isinstance(error.__cause__, HfHubHTTPError) else error
