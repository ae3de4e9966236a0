"""cosmos-scale: pre-training of COSMOS vision-language models on DeepSpeed, from one CPU to hundreds of GPUs.

In Python a trained model is `cosmos_scale.load(...)`, see `inference/`. What it needs is imported when it is asked for:
torch takes seconds.
"""

TYPE_CHECKING = False  # as in typing, whose import would come before a program can take an interrupt

if TYPE_CHECKING:
    from cosmos_scale.errors import UserError
    from cosmos_scale.inference import LoadedModel, load
else:

    def __getattr__(name: str) -> object:
        """Import what stands in `__all__`; raises UserError where a library cannot be imported."""
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        errors = import_module(f"{__name__}.errors")
        if name == "UserError":
            return errors.UserError
        try:
            return getattr(import_module(f"{__name__}.inference"), name)
        except Exception as error:  # any: libraries read variables of their own while they are imported
            from cosmos_scale.interrupt import refused_import

            if refused := refused_import(error):
                raise errors.UserError(refused) from None
            raise

    def __dir__() -> list[str]:
        """Name what may be asked for, for people who look for it by a key."""
        return sorted({*globals(), *__all__})


__version__ = "0.1.0"
__all__ = ["LoadedModel", "UserError", "load"]
