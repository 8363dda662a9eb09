"""Compress language models in JAX, and know what it cost.

    import jaxcomp
    report = jaxcomp.compress("demo:smollm2", jaxcomp.load_recipe("recipe.py"), "out")

Names are imported on first use, so that `import jaxcomp` is quick. Compiled programs are kept in
the user's cache directory; `JAXCOMP_CACHE=off` switches that off, a path moves it.
"""

import importlib
import os
import pathlib
import sys

__version__ = "0.1.0"

_NAMES = {
    "AWQ": "jaxcomp.methods",
    "AutoBits": "jaxcomp.methods",
    "Calibration": "jaxcomp.calibrate",
    "Descent": "jaxcomp.calibrate.descent",
    "Distill": "jaxcomp.methods",
    "E3Pruner": "jaxcomp.methods",
    "FAMILIES": "jaxcomp.models.families",
    "EVALS": "jaxcomp.evals",
    "FlatQuant": "jaxcomp.methods",
    "FuseGPT": "jaxcomp.methods",
    "GPTQ": "jaxcomp.methods",
    "LinearPatch": "jaxcomp.methods",
    "METHODS": "jaxcomp.methods",
    "MaskSearch": "jaxcomp.calibrate.mask_search",
    "Override": "jaxcomp.core.scheme",
    "Perplexity": "jaxcomp.evals",
    "MergeBlocks": "jaxcomp.methods",
    "PruneBlocks": "jaxcomp.methods",
    "QTensor": "jaxcomp.core.quantize",
    "QuaRot": "jaxcomp.methods",
    "QuantSpec": "jaxcomp.core.quantize",
    "RTN": "jaxcomp.methods",
    "Recovery": "jaxcomp.methods.e3pruner",
    "Sensitivity": "jaxcomp.methods",
    "Sampling": "jaxcomp.models.sampling",
    "SmoothQuant": "jaxcomp.methods",
    "CalibSpec": "jaxcomp.recipe",
    "Recipe": "jaxcomp.recipe",
    "Study": "jaxcomp.studies",
    "StudyRow": "jaxcomp.studies",
    "TopKLoss": "jaxcomp.calibrate.losses",
    "Trainable": "jaxcomp.calibrate.trainable",
    "compress": "jaxcomp.job",
    "evaluate": "jaxcomp.job",
    "forward": "jaxcomp.models.decoder",
    "generate": "jaxcomp.completion",
    "load": "jaxcomp.job",
    "load_recipe": "jaxcomp.recipe",
    "save": "jaxcomp.artefact",
    "use_integer": "jaxcomp.models.execution",
}
__all__ = sorted(_NAMES)


def __getattr__(name: str):
    if name in _NAMES:
        value = getattr(importlib.import_module(_NAMES[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'jaxcomp' has no attribute {name!r}; it has {', '.join(__all__)}")


def _keep_compilations() -> None:
    wish = os.environ.get("JAXCOMP_CACHE", "")
    if wish == "off" or "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    settings = {
        "jax_compilation_cache_dir": wish or str(pathlib.Path(base) / "jaxcomp" / "xla"),
        "jax_persistent_cache_min_compile_time_secs": "0.2",
    }
    for name, value in settings.items():
        os.environ.setdefault(name.upper(), value)
    if "jax" in sys.modules:  # too late for the environment
        import jax

        for name, value in settings.items():
            jax.config.update(name, float(value) if name.endswith("secs") else value)


_keep_compilations()
