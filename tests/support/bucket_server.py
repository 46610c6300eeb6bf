"""A small server with the shape of S3: signed addresses are checked by the rules of AWS's Signature Version 4.

Written from AWS's description ("Authenticating Requests: Using Query Parameters"), and by no code of the library that
signs. `server.objects` is what is in the buckets, by "bucket/key". The same server stands in for Azure's Put Blob and
Get Blob with a SAS token, and for Google's XML API, by other rules for signatures.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler
from urllib.parse import parse_qsl, quote, unquote, urlsplit
from xml.sax.saxutils import escape

from tests.support.shelf import XML, Answer, Shelf

KEY_ID, SECRET = "AKIAcAnaryKEY1234567", "cAnary/Secret+Key/1234567890abcdef"
REGION = "eu-central-7"
SAS = "sv=2024-11-04&sp=rcw&sig=cAnarySas1234567890"


class Buckets(Shelf):
    """`with Buckets() as server: server.objects["mine/a.txt"] = data`."""

    def __init__(self) -> None:
        super().__init__()
        self.buckets = {"mine"}
        self.objects: dict[str, bytes] = {}
        self.sizes: list[int] = []  # of the bodies that were put
        self.late = timedelta()  # how much later than the client this server thinks it is
        self.broken_puts: list[tuple[int, str]] = []  # answers to the next PUTs in place of taking them
        self.spoiled = False  # takes bytes, and keeps others
        self.may_list = True  # the key; without that, a file that is not there is forbidden
        self.may_read = True
        self.knows_conditions = True

    @property
    def keys(self) -> dict[str, str]:
        """The variables of a user of this server."""
        return {
            "AWS_ACCESS_KEY_ID": KEY_ID,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_REGION": REGION,
            "AWS_ENDPOINT_URL": self.url,
        }

    def answer(self, request: BaseHTTPRequestHandler, path: str, token: str) -> Answer:
        bucket, _, key = unquote(path).lstrip("/").partition("/")
        refused = self.refused(request, path)
        if refused is not None:
            return refused
        if bucket not in self.buckets:
            return 404, {}, XML.format("NoSuchBucket", "no such bucket").encode()
        if request.command == "PUT":
            return self.put(request, f"{bucket}/{key}")
        if not key:
            return self.list(bucket, dict(parse_qsl(urlsplit(request.path).query)).get("prefix", ""))
        name = f"{bucket}/{key}"
        if not self.may_read or (name not in self.objects and not self.may_list):
            return 403, {}, XML.format("AccessDenied", "Access Denied").encode()
        if name not in self.objects:
            return 404, {}, XML.format("NoSuchKey", "no such key").encode()
        self.files[path] = self.objects[name]
        return super().answer(request, path, token)

    def put(self, request: BaseHTTPRequestHandler, name: str) -> Answer:
        if self.broken_puts:
            status, code = self.broken_puts.pop(0)
            return status, {}, XML.format(code, "no").encode()
        needed, unwanted = request.headers.get("If-Match"), request.headers.get("If-None-Match")
        if (needed or unwanted) and not self.knows_conditions:
            return 501, {}, XML.format("NotImplemented", "no").encode()
        there = self.objects.get(name)
        if (unwanted and there is not None) or (needed and (there is None or needed != etag(there))):
            return 412, {}, XML.format("PreconditionFailed", "no").encode()
        body: bytes = request.body  # type: ignore[attr-defined]
        announced = request.headers.get("Content-MD5")
        if announced and base64.b64decode(announced) != hashlib.md5(body).digest():
            return 400, {}, XML.format("BadDigest", "no").encode()
        self.sizes.append(len(body))
        self.objects[name] = body[:-1] + b"?" if self.spoiled and body else body
        return 200, {"ETag": etag(self.objects[name])}, b""

    def list(self, bucket: str, prefix: str) -> Answer:
        rows = ""
        for name, data in sorted(self.objects.items()):
            key = name.removeprefix(f"{bucket}/")
            if name.startswith(f"{bucket}/") and key.startswith(prefix):
                rows += f"<Contents><Key>{escape(key)}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
                rows += f'<ETag>"{hashlib.md5(data).hexdigest()}"</ETag><Size>{len(data)}</Size></Contents>'
        body = f"<ListBucketResult><Name>{bucket}</Name><IsTruncated>false</IsTruncated>{rows}</ListBucketResult>"
        return 200, {"Content-Type": "application/xml"}, body.encode()

    def refused(self, request: BaseHTTPRequestHandler, path: str) -> Answer | None:
        query = dict(parse_qsl(urlsplit(request.path).query, keep_blank_values=True))
        if "sig" in query:  # Azure's
            if "&".join(f"{k}={v}" for k, v in query.items()) != SAS:
                return 403, {"x-ms-error-code": "AuthenticationFailed"}, b""
            if request.command == "PUT" and request.headers.get("x-ms-blob-type") != "BlockBlob":
                return 400, {"x-ms-error-code": "MissingRequiredHeader"}, b""
            return None
        signature = query.pop("X-Amz-Signature", None)
        if signature is None and request.headers.get("Authorization", "").startswith("AWS4-HMAC-SHA256"):
            found = re.search(r"Credential=([^/]+)/.*Signature=(\w+)", request.headers["Authorization"])
            known = found is not None and found[1] == KEY_ID
            return None if known else (403, {}, XML.format("InvalidAccessKeyId", "no").encode())
        if signature is None:
            return 403, {}, XML.format("AccessDenied", "Access Denied").encode()
        key_id, day, region, service, _ = query["X-Amz-Credential"].split("/")
        if key_id != KEY_ID:
            return 403, {}, XML.format("InvalidAccessKeyId", "no such key").encode()
        if region != REGION:
            return 400, {}, XML.format("AuthorizationHeaderMalformed", "the region is wrong").encode()
        made = datetime.strptime(query["X-Amz-Date"], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
        if datetime.now(UTC) + self.late > made + timedelta(seconds=int(query["X-Amz-Expires"])):
            return 403, {}, XML.format("AccessDenied", "Request has expired").encode()
        pairs = "&".join(f"{quote(k, safe='-_.~')}={quote(v, safe='-_.~')}" for k, v in sorted(query.items()))
        canonical = f"{request.command}\n{path}\n{pairs}\nhost:{request.headers['Host']}\n\nhost\nUNSIGNED-PAYLOAD"
        scope = f"{day}/{region}/{service}/aws4_request"
        text = f"AWS4-HMAC-SHA256\n{query['X-Amz-Date']}\n{scope}\n{hashlib.sha256(canonical.encode()).hexdigest()}"
        key = f"AWS4{SECRET}".encode()
        for part in (*scope.split("/")[:3], "aws4_request"):
            key = hmac.new(key, part.encode(), hashlib.sha256).digest()
        if not hmac.compare_digest(hmac.new(key, text.encode(), hashlib.sha256).hexdigest(), signature):
            return 403, {}, XML.format("SignatureDoesNotMatch", "no").encode()
        return None


def etag(data: bytes) -> str:
    return f'"{hashlib.md5(data).hexdigest()}"'
