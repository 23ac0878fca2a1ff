"""Check trackers and the Hub before a model is loaded."""

from __future__ import annotations

from typing import Any

from mel_lite.errors import ConfigError
from mel_lite.text import first_line, suggest

PACKAGES = {"azure_ml": "azureml-core mlflow", "comet_ml": "comet_ml", "dagshub": "dagshub mlflow", "flyte": "flytekit"}
"""Packages of the trackers that are not named like them."""


def check_services(args: Any) -> None:
    """Check the trackers of a run and, on rank 0, the Hub if it is pushed there. Raises: ConfigError."""
    check_trackers(args.report_to)
    if args.push_to_hub and args.process_index == 0:
        check_push(args)


def check_trackers(report_to: Any) -> None:
    """Check that the package of every tracker is installed. Raises: ConfigError."""
    from transformers.integrations import integration_utils

    names = [report_to] if isinstance(report_to, str) else list(report_to or [])
    known = list(integration_utils.INTEGRATION_TO_CALLBACK)
    installed = integration_utils.get_available_reporting_integrations()
    if integration_utils.is_flytekit_available():
        installed.append("flyte")
    for name in names:
        if name in ("none", "all"):
            continue
        if name not in known:
            raise ConfigError(f"report_to={name!r} is not a tracker.{suggest(name, known)} Set report_to.")
        if name not in installed:
            raise ConfigError(
                f"report_to={name!r}: the package is not installed. Run `pip install {PACKAGES.get(name, name)}`, or "
                "set report_to=none."
            )


def check_push(args: Any) -> None:
    """Check that the Hub can be reached and knows the token. Raises: ConfigError."""
    from huggingface_hub import HfApi, constants, errors, get_token

    later = "or set push_to_hub=false and upload the adapter later with `hf upload`."
    if constants.HF_HUB_OFFLINE:
        raise ConfigError(f"push_to_hub=true in offline mode: nothing can be pushed. Unset HF_HUB_OFFLINE, {later}")
    token = args.hub_token or get_token()
    if not token:
        raise ConfigError(f"push_to_hub=true without a token: the Hub would refuse it. Run `hf auth login`, {later}")
    try:
        HfApi().whoami(token=token)
    except errors.HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            raise ConfigError(
                f"push_to_hub=true: the Hub does not accept the token. Run `hf auth login` again, {later}"
            ) from error
        raise ConfigError(f"push_to_hub=true: the Hub answers with {first_line(error)}. Try again, {later}") from error
    except Exception as error:  # no network: the HTTP client has many ways to say so
        raise ConfigError(
            f"push_to_hub=true: the Hub cannot be reached ({type(error).__name__}). Connect to the network, {later}"
        ) from error
