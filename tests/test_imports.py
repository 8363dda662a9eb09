"""Who may import whom (the table of the design), read from the sources without running them."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PACKAGES = ("jaxcomp", "pallas_kernels")

# Layer → the layers it may import, itself always among them. "(lazy)" allows it inside functions
# and under TYPE_CHECKING only. A layer is a folder or a file directly under its package; the
# longest prefix of a module's name that is listed here decides.
MAY_IMPORT = {
    "pallas_kernels": (),
    "jaxcomp": (),  # __init__.py: names are imported on first use, by importlib
    "jaxcomp.core": ("jaxcomp.core",),
    "jaxcomp.core.quantize": ("jaxcomp.core", "pallas_kernels"),
    "jaxcomp.core.activation": ("jaxcomp.core", "pallas_kernels"),
    "jaxcomp.core.linear": ("jaxcomp.core", "pallas_kernels"),
    "jaxcomp.core.site": ("jaxcomp.core", "pallas_kernels"),
    "jaxcomp.core.transforms": ("jaxcomp.core", "pallas_kernels"),
    "jaxcomp.core.qarray": ("jaxcomp.core", "pallas_kernels.packing"),
    "jaxcomp.solvers": ("jaxcomp.core", "pallas_kernels.packing"),
    "jaxcomp.kv": ("jaxcomp.core", "pallas_kernels.packing"),
    "jaxcomp.parallel": (),
    "jaxcomp.models": ("jaxcomp.core", "jaxcomp.kv", "jaxcomp.parallel", "pallas_kernels"),
    "jaxcomp.hub": ("jaxcomp.models", "jaxcomp.core"),
    "jaxcomp.data": (),
    "jaxcomp.calibrate": (
        "jaxcomp.solvers",
        "jaxcomp.models",
        "jaxcomp.parallel",
        "jaxcomp.core",
    ),
    "jaxcomp.methods": ("jaxcomp.calibrate", "jaxcomp.solvers", "jaxcomp.models", "jaxcomp.core"),
    "jaxcomp.evals": ("jaxcomp.models", "jaxcomp.data", "jaxcomp.core"),
    "jaxcomp.report": ("jaxcomp.core", "jaxcomp.models"),
    "jaxcomp.artefact": ("jaxcomp.core", "jaxcomp.models"),
    "jaxcomp.recipe": ("jaxcomp.core", "(lazy) jaxcomp.methods", "(lazy) jaxcomp.evals"),
    "jaxcomp.studies": (  # methods and evaluations reach it inside recipes
        "jaxcomp.job",
        "jaxcomp.recipe",
        "jaxcomp.report",
        "jaxcomp.artefact",
        "jaxcomp.progress",
        "jaxcomp.calibrate",
    ),
}
ON_TOP = (
    "jaxcomp.job",
    "jaxcomp.completion",
    "jaxcomp.bench",
    "jaxcomp.export",
    "jaxcomp.progress",
    "jaxcomp.commands",
    "jaxcomp.__main__",
)
REGISTRIES = ("jaxcomp.methods", "jaxcomp.evals")  # their __init__ alone imports all their files

LOADED_LATE = (
    "transformers",
    "datasets",
    "gguf",
    "huggingface_hub",
    "lm_eval",
    "matplotlib",
    "orbax",
    "qwix",
)
KERNELS_NEED = {"jax", "jaxtyping", "numpy"}


def modules(package):
    """Dotted name → path of every module under `package`."""
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def imports(name, path):
    """(what is imported, at import time or late) for every import statement of a module."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    return list(_walk(ast.parse(path.read_text()), package, True))


def _walk(tree, package, early):
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.Import):
            yield from ((alias.name, early) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            above = package.rsplit(".", child.level - 1)[0] if child.level else ""
            source = ".".join(filter(None, (above, child.module)))
            for alias in child.names:  # a module, or a name of one
                yield (
                    (f"{source}.{alias.name}", early)
                    if _is_module(source, alias)
                    else (source, early)
                )
        late = isinstance(child, ast.FunctionDef | ast.Lambda) or (
            isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test)
        )
        yield from _walk(child, package, early and not late)


def _is_module(source, alias):
    place = ROOT.joinpath(*source.split("."), alias.name)
    return place.is_dir() or place.with_suffix(".py").is_file()


def layer(name):
    """The longest prefix of `name` that the table knows; None for what is not ours."""
    words = name.split(".")
    prefixes = (".".join(words[:n]) for n in range(len(words), 0, -1))
    return next((p for p in prefixes if p in MAY_IMPORT or p in ON_TOP), None)


def allowed(source, target, early):
    if layer(source) in ON_TOP or layer(target) == layer(source):
        return True
    may = MAY_IMPORT[layer(source)]
    within = lambda wanted: target == wanted or target.startswith(f"{wanted}.")  # noqa: E731
    return any(within(m) for m in may) or (
        not early and any(within(m.removeprefix("(lazy) ")) for m in may)
    )


ALL = [pytest.param(*m, id=m[0]) for package in PACKAGES for m in modules(package)]


@pytest.mark.parametrize(("name", "path"), ALL)
def test_imports_point_down(name, path):
    ours = [(what, early) for what, early in imports(name, path) if what.split(".")[0] in PACKAGES]
    bad = [what for what, early in ours if not allowed(name, what, early)]
    assert not bad, f"{name} imports {bad}; see MAY_IMPORT"


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("jaxcomp.core.site", "jaxcomp.models.decoder"),
        ("jaxcomp.core.tree", "pallas_kernels"),
        ("jaxcomp.solvers.gptq", "pallas_kernels.quant_matmul"),
        ("jaxcomp.models.decoder", "jaxcomp.calibrate.stream"),
        ("jaxcomp.evals.cost", "jaxcomp.methods"),
        ("jaxcomp.methods.gptq", "jaxcomp.job"),
        ("jaxcomp.recipe", "jaxcomp.methods"),
        ("jaxcomp.studies.run", "jaxcomp.methods"),
        ("pallas_kernels.packing", "jaxcomp.core.quantize"),
    ],
)
def test_the_table_forbids_what_points_up(source, target):
    assert not allowed(source, target, early=True)
    assert allowed("jaxcomp.recipe", "jaxcomp.methods", early=False)


def test_no_method_or_evaluation_imports_another():
    for registry in REGISTRIES:
        for name, path in modules(registry.replace(".", "/")):
            siblings = [
                what
                for what, _ in imports(name, path)
                if what.startswith(registry) and what not in (name, registry) and name != registry
            ]
            assert not siblings, f"{name} imports {siblings}"
            assert name == registry or registry not in [what for what, _ in imports(name, path)]


@pytest.mark.parametrize(("name", "path"), ALL)
def test_heavy_packages_are_imported_late_and_torch_never(name, path):
    found = [(what.split(".")[0], early) for what, early in imports(name, path)]
    assert not [what for what, _ in found if what in ("torch", "torch_npu", "torch_bridge")]
    assert not [what for what, early in found if early and what in LOADED_LATE]


def test_kernels_depend_on_jax_alone():
    found = {what.split(".")[0] for m in modules("pallas_kernels") for what, _ in imports(*m)}
    assert found - set(sys.stdlib_module_names) <= KERNELS_NEED | {"pallas_kernels"}


def test_everything_ours_is_in_the_table():
    known = {p for p in MAY_IMPORT if p.count(".")} | set(ON_TOP)
    assert not [n for n, _ in modules("jaxcomp") if n != "jaxcomp" and layer(n) not in known]
    assert "jaxcomp.models.decoder" in [n for n, _ in modules("jaxcomp")]  # the walk finds files


def test_the_reader_of_imports_sees_every_form(tmp_path):
    source = tmp_path / "m.py"
    source.write_text(
        "import a.b\nfrom jaxcomp import core\nfrom jaxcomp.core.tree import get_at\n"
        "if TYPE_CHECKING:\n    import late\n"
        "def f():\n    from . import g\nclass C:\n    import d\n"
    )
    assert imports("jaxcomp.models.m", source) == [
        ("a.b", True),
        ("jaxcomp.core", True),
        ("jaxcomp.core.tree", True),
        ("late", False),
        ("jaxcomp.models", False),
        ("d", True),
    ]


def test_importing_the_package_loads_no_jax():
    code = "import sys, jaxcomp; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
