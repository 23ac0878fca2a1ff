"""The preset YAML files. Found through `mel_lite.configs.__path__[0]`, in a checkout and installed alike."""

if __name__ == "configs":
    raise ImportError("this folder is the package `mel_lite.configs`; import it by that name")
