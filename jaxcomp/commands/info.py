"""`jaxcomp info`: versions, devices, registries."""

from jaxcomp.commands.common import Traceback, console, plain_errors


def run(traceback: Traceback = False) -> None:
    """Show versions, devices, the cache directory, and the names in the registries."""
    with plain_errors(traceback):
        import jax

        import jaxcomp
        from jaxcomp.data import CORPORA
        from jaxcomp.evals import EVALS
        from jaxcomp.methods import METHODS
        from jaxcomp.models.families import FAMILIES
        from jaxcomp.report import environment

        facts = {"jaxcomp": jaxcomp.__version__} | environment()
        facts["compilation cache"] = jax.config.jax_compilation_cache_dir or "off"
        tables = {"methods": METHODS, "families": FAMILIES, "evaluations": EVALS, "texts": CORPORA}
        for name, value in [*facts.items(), *((k, ", ".join(v)) for k, v in tables.items())]:
            console.print(f"{name:<18} {value}", highlight=False, markup=False, soft_wrap=True)
