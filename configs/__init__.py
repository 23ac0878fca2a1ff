"""Preset YAML files. `mel_lite.configs.__path__[0]` is their folder, both in a checkout and when installed."""

if __name__ == "configs":
    raise ImportError("this folder is the package `mel_lite.configs`; import it under that name")
