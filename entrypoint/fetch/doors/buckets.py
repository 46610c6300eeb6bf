"""Files in buckets: s3:// (of any service that speaks S3), gs:// and az://.

The library (obstore) finds the keys and signs addresses; it is not used to move bytes. A signed address is read and
written through our own client, so that its bounds hold here too, and what is said and retried is the same for all.

Keys, regions and endpoints come from the variables that the tools of each service read.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import quote

from entrypoint.fetch.doors import web
from entrypoint.fetch.doors.offer import Offer
from entrypoint.fetch.http import RetryPolicy
from entrypoint.system import public_addresses
from trainer.network import addresses
from trainer.spec.errors import DataError, GatedError, KilnError, SettingsError, UnreachableError
from trainer.spec.values import printable
from trainer.storage.safe_names import Names

SCHEMES = {"s3": "s3", "gs": "gs", "gcs": "gs", "az": "az", "azure": "az"}
VALID = timedelta(hours=12)  # of a signature
MOST_FILES = 200_000  # below one prefix, as in an archive
KEY_OF = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (AWS_SKIP_SIGNATURE=true for a public bucket)",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS to the key file of a service account (GOOGLE_SKIP_SIGNATURE=true for a "
    "public bucket)",
    "az": "AZURE_STORAGE_ACCOUNT_NAME with AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_TOKEN "
    "(AZURE_SKIP_SIGNATURE=true for a public container)",
}
NAMES: dict[str, dict[str, tuple[str, ...]]] = {  # option of the library → variables, the first that is set
    "s3": {
        "access_key_id": ("AWS_ACCESS_KEY_ID",),
        "secret_access_key": ("AWS_SECRET_ACCESS_KEY",),
        "session_token": ("AWS_SESSION_TOKEN",),
        "region": ("AWS_REGION", "AWS_DEFAULT_REGION"),
        "endpoint": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"),
        "virtual_hosted_style_request": ("AWS_VIRTUAL_HOSTED_STYLE_REQUEST",),
        "role_arn": ("AWS_ROLE_ARN",),
        "web_identity_token_file": ("AWS_WEB_IDENTITY_TOKEN_FILE",),
        "container_credentials_relative_uri": ("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",),
        "container_credentials_full_uri": ("AWS_CONTAINER_CREDENTIALS_FULL_URI",),
        "container_authorization_token_file": ("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE",),
    },
    "gs": {
        "application_credentials": ("GOOGLE_APPLICATION_CREDENTIALS",),
        "service_account": ("GOOGLE_SERVICE_ACCOUNT",),
        "service_account_key": ("GOOGLE_SERVICE_ACCOUNT_KEY",),
        "base_url": ("GOOGLE_BASE_URL",),
    },
    "az": {
        "account_name": ("AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_ACCOUNT"),
        "account_key": ("AZURE_STORAGE_ACCOUNT_KEY", "AZURE_STORAGE_KEY"),
        "endpoint": ("AZURE_STORAGE_ENDPOINT",),
        "tenant_id": ("AZURE_TENANT_ID", "AZURE_STORAGE_TENANT_ID"),
        "client_id": ("AZURE_CLIENT_ID", "AZURE_STORAGE_CLIENT_ID"),
        "client_secret": ("AZURE_CLIENT_SECRET", "AZURE_STORAGE_CLIENT_SECRET"),
    },
}
_PLACE = re.compile(r"([A-Za-z0-9]{2,5})://([A-Za-z0-9$][\w.$-]{1,254})(?:/(.*))?", re.DOTALL)


@dataclass(frozen=True)
class Place:
    """A file, or a prefix, in a bucket (at Azure a container)."""

    service: str  # s3 | gs | az
    bucket: str
    path: str

    def below(self, name: str) -> Place:
        before = self.path.rstrip("/")
        return Place(self.service, self.bucket, f"{before}/{name}" if before else name)

    def __str__(self) -> str:
        return f"{self.service}://{self.bucket}/{self.path}"


def is_one(text: str) -> bool:
    return text.partition("://")[0].lower() in SCHEMES and "://" in text


def parse(named: str, text: str) -> Place:
    """Raises SettingsError, with the fix."""
    found = _PLACE.fullmatch(text)
    if found is None or "?" in text or "#" in text or "@" in text:
        raise SettingsError(f"{named} is not written as s3://BUCKET/PATH (or gs://, az://CONTAINER/PATH). Correct it.")
    return Place(SCHEMES[found[1].lower()], found[2], found[3] or "")


def ask(named: str, text: str, clouds: Mapping[str, str], *, retries: RetryPolicy) -> Offer:
    """What the service says of a file. Raises SettingsError, GatedError, UnreachableError."""
    place = parse(named, text)
    if not place.path or place.path.endswith("/"):
        raise SettingsError(f"{named} names a folder of a bucket. Name a file in it.")
    return web.describe(named, signed(named, place, "GET", clouds), {}, retries=retries, key=KEY_OF[place.service])


def signed(named: str, place: Place, method: str, clouds: Mapping[str, str]) -> str:
    """An address of `place` that needs no further key. Raises GatedError where there is none, SettingsError."""
    if _is_set(clouds, f"{_prefix(place.service)}SKIP_SIGNATURE"):
        return _plain(named, place, clouds)
    if place.service == "az" and (token := _sas(clouds)):
        return f"{_plain(named, place, clouds)}?{token}"
    import obstore

    sign: Any = obstore.sign
    with _errors(named, place):
        return str(sign(_store(named, place, clouds), method, place.path, VALID))


def listed(named: str, place: Place, clouds: Mapping[str, str]) -> Iterator[tuple[str, int, str]]:
    """Names, bytes and versions (ETags, or dates where there are none) of all files below a prefix.

    Consoles and mounts make empty files where they show folders, which are left out. Raises GatedError, SettingsError,
    UnreachableError.
    """
    import obstore

    prefix = place.path.rstrip("/")
    found: list[tuple[PurePosixPath, int, str]] = []
    folders: set[PurePosixPath] = {PurePosixPath()}
    with _errors(named, place):
        store = _store(named, place, clouds)
        for batch in obstore.list(store, prefix or None):
            for entry in batch:
                path = PurePosixPath(entry["path"])
                name = path.relative_to(prefix) if prefix else path
                found.append((name, int(entry["size"]), entry["e_tag"] or entry["last_modified"].isoformat()))
                folders.update(name.parents)
                if len(found) > MOST_FILES:
                    raise SettingsError(f"{named}: more than {MOST_FILES:,} files. Pack them into archives.")
    names = Names()
    for name, size, version in found:
        if size == 0 and name in folders:
            continue
        try:
            names.add(str(name), folder=False)
        except DataError as problem:
            raise SettingsError(f"{named}: {printable(str(problem))}. Rename it in the bucket.") from problem
        yield str(name), size, version


def endpoint(service: str, clouds: Mapping[str, str]) -> str:
    """The address and the account of a service where these are not the usual ones: the same name is another bucket."""
    given = _connection(clouds) if service == "az" else {}
    for option in ("endpoint", "base_url", "account_name"):
        for variable in NAMES[service].get(option, ()):
            if value := clouds.get(variable, "").strip():
                given[option] = value
                break
    return " ".join(given[option] for option in ("endpoint", "base_url", "account_name") if option in given)


# ---- the library


def _store(named: str, place: Place, clouds: Mapping[str, str]) -> Any:
    from obstore.store import AzureStore, GCSStore, S3Store

    if os.environ.get(public_addresses.VARIABLE):  # the library connects by itself, past the guard of Python's sockets
        raise SettingsError(
            f"{named}: a request may name nothing in a bucket. Fix: a signed https address of one file or archive."
        )
    options: dict[str, Any] = {}
    for option, variables in NAMES[place.service].items():
        for variable in variables:
            if value := clouds.get(variable, "").strip():
                options.setdefault(option, value)
    if place.service == "s3":
        options.setdefault("region", "us-east-1")
    if place.service == "az":
        options = {**_connection(clouds), **options}
        if "account_name" not in options:
            raise GatedError(f"{named}: no storage account is named. Set {KEY_OF['az']}.")
    if _is_set(clouds, f"{_prefix(place.service)}SKIP_SIGNATURE"):
        options["skip_signature"] = True
    elif place.service == "az" and (token := _sas(clouds)):
        options["sas_key"] = token
    endpoint = str(options.get("endpoint") or options.get("base_url") or "")
    if endpoint and (problem := addresses.problem_of(endpoint)):
        raise SettingsError(f"{named}: the endpoint {addresses.shown(endpoint)}: {problem}. Correct it.")
    kind: Any = {"s3": S3Store, "gs": GCSStore, "az": AzureStore}[place.service]
    client = {"allow_http": endpoint.startswith("http://"), "timeout": timedelta(seconds=60)}
    client["connect_timeout"] = timedelta(seconds=5)
    retry = {"max_retries": 3, "retry_timeout": timedelta(seconds=30)}
    return kind(place.bucket, config=options, client_options=client, retry_config=retry)


class _errors:  # noqa: N801 (a context manager, used as a function)
    """The library's errors as ours, without their texts: these quote requests, and may hold signatures."""

    def __init__(self, named: str, place: Place) -> None:
        self.named, self.place = named, place

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, problem: BaseException | None, trace: Any) -> None:
        if not isinstance(problem, Exception) or isinstance(problem, KilnError):
            return
        raise _translated(self.named, self.place, problem) from None


def _translated(named: str, place: Place, problem: Exception) -> KilnError:
    text, name = str(problem), type(problem).__name__
    key = KEY_OF[place.service]
    if name == "InvalidPathError":
        return SettingsError(f"{named}: a name in the bucket leads out of its folder, or is none. Rename that file.")
    if name in ("PermissionDeniedError", "UnauthenticatedError") or " 403 " in text or " 401 " in text:
        if "169.254." in text or "metadata.google" in text:
            return GatedError(f"{named}: there is no key for this bucket. Set {key}.")
        return GatedError(f"{named}: the key may not do this there. Set {key}.")
    if name == "NotFoundError" or "NoSuchBucket" in text or "ContainerNotFound" in text:
        return SettingsError(f"{named}: there is no such bucket. Check its name, the endpoint and the region.")
    if "169.254." in text or "metadata.google" in text or "redential" in text or "OAuth" in text:
        return GatedError(f"{named}: there is no key for this bucket, or none that can be used. Set {key}.")
    if "error sending request" in text or "timed out" in text or "onnect" in text or "status: 5" in text:
        return UnreachableError(f"{named}: the service does not answer. Check the endpoint and the network.")
    if isinstance(problem, (ValueError, OSError)) or "Unable to" in text or "decode" in text or "nvalid" in text:
        return GatedError(f"{named}: the key cannot be used as it is written ({name}). Set {key}.")
    return UnreachableError(f"{named}: the service has failed ({name}). Start again later.")


def _prefix(service: str) -> str:
    return {"s3": "AWS_", "gs": "GOOGLE_", "az": "AZURE_"}[service]


def _is_set(clouds: Mapping[str, str], name: str) -> bool:
    return clouds.get(name, "").strip().lower() in ("true", "1", "yes")


def _connection(clouds: Mapping[str, str]) -> dict[str, str]:
    """The options in AZURE_STORAGE_CONNECTION_STRING."""
    pairs = dict(part.partition("=")[::2] for part in clouds.get("AZURE_STORAGE_CONNECTION_STRING", "").split(";"))
    known = {"account_name": "AccountName", "account_key": "AccountKey", "endpoint": "BlobEndpoint"}
    return {option: pairs[key] for option, key in known.items() if pairs.get(key)}


def _sas(clouds: Mapping[str, str]) -> str:
    pairs = dict(part.partition("=")[::2] for part in clouds.get("AZURE_STORAGE_CONNECTION_STRING", "").split(";"))
    token = clouds.get("AZURE_STORAGE_SAS_TOKEN") or clouds.get("AZURE_STORAGE_SAS_KEY")
    return (token or pairs.get("SharedAccessSignature", "")).strip().lstrip("?")


def _plain(named: str, place: Place, clouds: Mapping[str, str]) -> str:
    """The address without a signature."""
    path = quote(place.path)
    if place.service == "gs":
        return (
            f"{clouds.get('GOOGLE_BASE_URL', '').rstrip('/') or 'https://storage.googleapis.com'}/{place.bucket}/{path}"
        )
    if place.service == "az":
        options = _connection(clouds)
        account = clouds.get("AZURE_STORAGE_ACCOUNT_NAME") or clouds.get("AZURE_STORAGE_ACCOUNT")
        account = account or options.get("account_name")
        endpoint = clouds.get("AZURE_STORAGE_ENDPOINT") or options.get("endpoint")
        if not account and not endpoint:
            raise GatedError(f"{named}: no storage account is named. Set {KEY_OF['az']}.")
        return f"{(endpoint or f'https://{account}.blob.core.windows.net').rstrip('/')}/{place.bucket}/{path}"
    endpoint = next((clouds[name] for name in NAMES["s3"]["endpoint"] if clouds.get(name)), "")
    region = clouds.get("AWS_REGION") or clouds.get("AWS_DEFAULT_REGION") or "us-east-1"
    return f"{endpoint.rstrip('/') or f'https://s3.{region}.amazonaws.com'}/{place.bucket}/{path}"
