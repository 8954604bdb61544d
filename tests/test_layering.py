"""The modules form layers: imports run one way, and what knows transformers or hooks is where it should be."""

import ast
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import saeguard

ROOT = Path(saeguard.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
PURE = (
    "tokens", "statistics", "selection", "gate", "calibration", "clamp", "errors", "corpus", "windows", "hooks",
    "sae.autoencoder", "sae.slim", "sae.tensors", "sae.formats.saelens",
)  # fmt: skip
KNOW_TRANSFORMERS = {
    "model", "online.sequences", "online.memory", "online.passes", "online.rereading", "online.intervention",
    "evaluation.prefix", "embedded",
    "baselines.training",
}  # fmt: skip
HOOKS = ("register_forward_hook", "register_forward_pre_hook")
UNSAFE = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}


def name_of(path: Path) -> str:
    """`gate`, `sae.slim`; a package is its `__init__`, the whole is `__init__`."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts)


MODULES = {name_of(path): path for path in FILES}


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def statements(node: ast.AST, *, lazy: bool) -> Iterator[ast.Import | ast.ImportFrom]:
    """Import statements that run when the module is imported; with `lazy` also those inside functions."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child
        elif not is_type_checking(child) and (lazy or not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)):
            yield from statements(child, lazy=lazy)


def submodule(package: str, name: str) -> str:
    """What `from package import name` imports: a module of ours, or the package itself."""
    full = f"{package}.{name}"
    return full if full.removeprefix("saeguard.") in MODULES else package


@cache
def imports(module: str, *, lazy: bool = False) -> frozenset[str]:
    """Full names of what a module imports."""
    found = set()
    for node in statements(ast.parse(MODULES[module].read_text("utf-8")), lazy=lazy):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        else:
            assert not node.level, f"{module}: relative import"
            found |= {submodule(str(node.module), alias.name) for alias in node.names}
    return frozenset(found)


def inside(module: str) -> set[str]:
    """Modules of this package that a module imports when it is imported."""
    names = {name.removeprefix("saeguard.") for name in imports(module) if name.startswith("saeguard.")}
    found = {name for name in names if name in MODULES}
    return found | {f"{name}.__init__" for name in names if f"{name}.__init__" in MODULES}


def below(module: str) -> set[str]:
    """All that is imported with a module, itself too."""
    found, waiting = set(), [module]
    while waiting:
        if (one := waiting.pop()) not in found:
            found.add(one)
            waiting += inside(one)
    return found


def packages(module: str, *, lazy: bool = False) -> set[str]:
    return {name.split(".")[0] for name in imports(module, lazy=lazy)}


def test_imports_have_no_cycle():
    order = list(TopologicalSorter({module: inside(module) - {module} for module in MODULES}).static_order())
    assert set(order) == set(MODULES)
    assert order.index("gate") < order.index("guardrail") < order.index("online.intervention") < order.index("generate")


@pytest.mark.parametrize("module", PURE)
def test_decisions_have_never_heard_of_hugging_face(module):
    for one in below(module):
        assert not packages(one) & {"transformers", "huggingface_hub", "tokenizers"}, f"{module} through {one}"


def test_only_a_few_modules_know_transformers():
    assert {module for module in MODULES if "transformers" in packages(module, lazy=True)} <= KNOW_TRANSFORMERS


def test_only_one_module_knows_vllms_insides():
    users = {module for module in MODULES if "vllm" in packages(module, lazy=True)}
    assert users == {f"serving.vllm.{name}" for name in ("engine", "worker", "offline", "endpoint", "launch")}
    inside = {name: {i for i in imports(name, lazy=True) if i.startswith("vllm.v1")} for name in MODULES}
    assert {name for name, found in inside.items() if found} == {"serving.vllm.worker"}
    assert "vllm" not in packages("serving.vllm.plugin")


def test_only_hooks_registers_hooks():
    users = {module for module, path in MODULES.items() if any(name in path.read_text("utf-8") for name in HOOKS)}
    assert users == {"hooks"}


def test_nothing_imports_the_command_line_or_the_package_face():
    for module in MODULES:
        if not module.startswith("cli."):
            assert not any(name.startswith("saeguard.cli") for name in imports(module, lazy=True)), module
            assert "saeguard" not in {name for name in imports(module) if name == "saeguard"}, module


def test_nothing_is_ever_unpickled():
    for module, path in MODULES.items():
        tree = ast.parse(path.read_text("utf-8"))
        assert not packages(module, lazy=True) & UNSAFE, module
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            assert ast.unparse(call.func) not in {"eval", "exec"}, module
            if ast.unparse(call.func) in {"np.load", "numpy.load"}:
                assert "allow_pickle=False" in {ast.unparse(keyword) for keyword in call.keywords}, module
            if ast.unparse(call.func) == "torch.load":
                assert "weights_only=True" in {ast.unparse(keyword) for keyword in call.keywords}, module


def test_no_error_is_swallowed_wholesale():
    for module, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ExceptHandler):
                caught = "" if node.type is None else ast.unparse(node.type)
                assert caught not in {"", "Exception", "BaseException"}, f"{module}, line {node.lineno}"
