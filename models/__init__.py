"""The decoder and its state: LLaMA in Flax NNX, its configuration and its KV cache."""

if __name__ != "jaxdecode.models":
    raise ImportError(
        f"this package was imported as {__name__!r}; import it as 'jaxdecode.models', "
        "or its classes would exist twice"
    )
