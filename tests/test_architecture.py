"""Who may import whom: read off every import statement in the package."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "ldm"

ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "types": set(),
    "layers": {"errors", "types"},
    "models": {"errors", "types", "layers"},
    "diffusion": {"errors", "types"},
    "samplers": {"errors", "types", "diffusion"},
    "weights": {"errors", "types", "layers", "models"},
    "data": {"errors"},
    "evaluation": {"errors", "types", "models", "diffusion", "weights", "pipeline"},
    "pipeline": {"errors", "types", "layers", "models", "diffusion", "samplers", "weights"},
    "search": {"errors", "types", "models", "weights", "pipeline"},
    "tasks": {"errors", "types", "layers", "models", "diffusion", "samplers", "weights", "pipeline", "evaluation"},
    "training": {
        "errors", "types", "layers", "models", "diffusion", "samplers", "weights", "data", "pipeline", "evaluation",
    },
    "apps": {
        "errors", "types", "layers", "models", "diffusion", "samplers", "weights", "data", "pipeline", "evaluation",
        "tasks", "training", "search",
    },
}  # fmt: skip
"""Each folder or file of the package, and what it may import besides itself."""

EXCEPTIONS = {
    ("pipeline/latent_diffusion.py", "tasks"): "model.generate(...) is the library's name for the tasks",
}
"""Imports against the direction, inside a function only."""

HEAVY: dict[str, set[str]] = {
    "transformers": {"models/depth.py", "training/engine/optimizers.py"},
    "diffusers": {"evaluation/bench_diffusers.py"},
    "peft": {"training/adapters.py", "evaluation/bench_diffusers.py"},
    "open_clip": {
        "training/clip/objective.py",
        "training/clip/model.py",
        "models/image_encoder.py",
        "pipeline/clip/open_clip_model.py",
    },
    "accelerate": {"training/engine/loop.py", "training/engine/ranks.py", "training/engine/run.py"},
    "torchao": {"training/engine/optimizers.py"},
    "prodigyopt": {"training/engine/optimizers.py"},
    "schedulefree": {"training/engine/optimizers.py"},
    "jinja2": {"training/tune/report.py", "apps/output/check_page.py"},
    "matplotlib": {"training/tune/report.py"},
    "xformers": {"layers/attention.py"},
    "ftfy": {"models/tokenizer.py"},
    "tyro": {
        "apps/cli.py",
        "apps/flags/shared.py",
        "apps/flags/commands.py",
        "apps/flags/tune.py",
        "data/packed.py",
        "data/pictures/build.py",
        "training/clip/figures.py",
    },
    "rich": {
        "apps/bench.py",
        "apps/check.py",
        "apps/output/progress.py",
        "apps/info.py",
        "apps/output/info_page.py",
        "apps/output/match_tables.py",
        "apps/output/rows.py",
    },
    "pydantic": {"pipeline/request.py", "pipeline/validation.py"},
    "faiss": {"search/nearest.py"},
    "pyarrow": {"data/imagefolder.py", "data/parquet_pictures.py"},
    "cv2": {"pipeline/control.py"},
}
"""Heavy packages, or ones with a single purpose, and the files that may import them."""

LIGHT = (
    *("__init__.py", "__main__.py", "errors.py"),
    *("apps/cli.py", "apps/generate.py", "apps/grid.py", "apps/sheet.py"),
    *("apps/flags/axes.py", "apps/flags/commands.py", "apps/flags/controls.py"),
    *("apps/flags/requests.py", "apps/flags/shared.py"),
    *("apps/output/progress.py", "apps/output/tiles.py"),
    *("pipeline/files.py", "pipeline/images.py", "pipeline/request.py"),
)
"""What the command line imports before it knows that it needs torch."""


@dataclass(frozen=True)
class Import:
    """One imported module; where it stands; whether a function holds it, and whether only type checkers see it."""

    file: str
    line: int
    module: str
    inside: bool
    typing_only: bool


def imports() -> Iterator[Import]:
    """Every import in the package, `from ldm import x` as ldm.x."""
    for path in sorted(PACKAGE.rglob("*.py")):
        file = path.relative_to(PACKAGE).as_posix()
        yield from _imports_of(ast.parse(path.read_text(encoding="utf-8")), file)


def _imports_of(node: ast.AST, file: str, inside: bool = False, typing_only: bool = False) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield Import(file, child.lineno, alias.name, inside, typing_only)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0 and child.module, f"{file}:{child.lineno}: a relative import"
            joined = [f"ldm.{alias.name}" for alias in child.names] if child.module == "ldm" else [child.module]
            for module in joined:
                yield Import(file, child.lineno, module, inside, typing_only)
        elif isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            yield from _imports_of(child, file, inside, True)
        else:
            held = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from _imports_of(child, file, inside or held, typing_only)


ALL = list(imports())


def part_of(file: str) -> str:
    """ "pipeline/load.py" -> "pipeline", "types.py" -> "types"."""
    return file.partition("/")[0].removesuffix(".py")


def test_there_is_something_to_read():
    assert len(ALL) > 300 and {part_of(i.file) for i in ALL} >= set(ALLOWED) - {"evaluation", "errors"}


def test_every_folder_has_a_rule():
    parts = {part_of(path.relative_to(PACKAGE).as_posix()) for path in PACKAGE.rglob("*.py")}
    assert parts <= {*ALLOWED, "__init__", "__main__"}


def test_imports_keep_their_direction():
    wrong = []
    for found in ALL:
        here, _, rest = found.module.partition(".")
        if here != "ldm" or not rest or part_of(found.file) in ("__init__", "__main__"):
            continue
        part, target = part_of(found.file), rest.partition(".")[0]
        excused = (found.file, target) in EXCEPTIONS and (found.inside or found.typing_only)
        if target != "__version__" and target != part and target not in ALLOWED[part] and not excused:
            wrong.append(f"{found.file}:{found.line} imports {found.module}")
    assert not wrong, "\n".join(wrong)


def test_every_exception_is_needed():
    used = {(found.file, found.module.split(".")[1]) for found in ALL if found.module.startswith("ldm.")}
    assert set(EXCEPTIONS) <= used


def test_heavy_packages_are_imported_in_one_place():
    wrong = []
    for found in ALL:
        package = found.module.partition(".")[0]
        if package in HEAVY and not found.typing_only and found.file not in HEAVY[package]:
            wrong.append(f"{found.file}:{found.line} imports {found.module}")
    assert not wrong, "\n".join(wrong)


def test_light_files_import_torch_inside_functions_only():
    heavy = ("torch", "numpy", "safetensors", "transformers", "diffusers", "accelerate", "datasets")
    wrong = [
        f"{found.file}:{found.line} imports {found.module}"
        for found in ALL
        if found.file in LIGHT and found.module.partition(".")[0] in heavy and not (found.inside or found.typing_only)
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("code", "absent", "seconds"),
    [
        ("import ldm", ("torch", "numpy", "pydantic", "PIL", "tyro", "rich"), 0.1),
        ("import ldm.pipeline.request", ("torch", "numpy", "PIL", "tyro", "rich"), 1.0),
        ("import ldm.apps.cli", ("torch", "numpy", "PIL", "rich"), 1.0),
        (
            "import ldm.tasks, ldm.pipeline.load",
            ("transformers", "diffusers", "open_clip", "accelerate", "peft", "torchvision", "pandas", "tyro", "rich",
             "matplotlib", "scipy", "ftfy", "torch._inductor", "torch._dynamo.eval_frame"),
            30.0,
        ),
        ("import ldm.apps.tune", ("peft", "open_clip", "torchao", "diffusers", "matplotlib", "jinja2"), 60.0),
    ],
    ids=["ldm", "request", "cli", "generate", "tune"],
)  # fmt: skip
def test_what_an_import_brings(code, absent, seconds):
    """In a fresh process: nothing that is not needed, and in good time (CPU seconds)."""
    script = (
        f"import sys, time\nbegun = time.process_time()\n{code}\nspent = time.process_time() - begun\n"
        f"print([name for name in {absent!r} if name in sys.modules], spent)"
    )
    answer = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    found, _, spent = answer.stdout.strip().rpartition(" ")
    assert found == "[]" and float(spent) < seconds


def test_the_public_names():
    import ldm

    for name in set(ldm.__all__) - {"__version__"}:
        assert getattr(ldm, name).__name__ == name
    assert dir(ldm) == sorted(ldm.__all__)
    with pytest.raises(AttributeError, match="module 'ldm' has no attribute 'lod'"):
        ldm.lod  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue]


def test_no_print_outside_of_the_applications():
    for path in PACKAGE.rglob("*.py"):
        if part_of(path.relative_to(PACKAGE).as_posix()) == "apps":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            called = node.func if isinstance(node, ast.Call) else None
            assert not (isinstance(called, ast.Name) and called.id == "print"), f"{path}:{getattr(node, 'lineno', 0)}"
