"""`python -m mel_lite` is the `mel-lite` command, for `accelerate launch -m` and `torchrun -m`."""

from mel_lite.cli.main import main

if __name__ == "__main__":
    main()
