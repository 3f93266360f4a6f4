"""A server that speaks the part of HashiCorp Vault's HTTP API that the key store uses: transit and KV version 2.

It really encrypts (AES-GCM) and hashes, holds to check-and-set, asks for a token, and can be told to fail.
"""

import hmac
import json
import secrets
import threading
from base64 import b64decode, b64encode
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

TOKEN = "hvs.test"


class VaultServer(ThreadingHTTPServer):
    """Use it in ``with``. ``failures`` are HTTP statuses to answer with first, ``breaks_after`` is how many calls are
    answered before none is any more; ``calls`` lists what was asked.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.lock = threading.Lock()
        self.entries: dict[str, tuple[dict[str, Any], int]] = {}
        self.key = AESGCM(AESGCM.generate_key(256))
        self.hashing = secrets.token_bytes(32)
        self.failures: list[int] = []
        self.calls: list[str] = []
        self.has_transit_key = True
        self.breaks_after: int | None = None

    def __enter__(self) -> "VaultServer":
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def answer(self, method: str, path: str, said: dict[str, Any]) -> tuple[int, Any]:
        match path.strip("/").split("/", 2):
            case ["transit", "datakey", rest] if rest == "plaintext/magnatronic" and self.has_transit_key:
                plain = secrets.token_bytes(said.get("bits", 256) // 8)
                return 200, {"plaintext": b64encode(plain).decode(), "ciphertext": self._wrap(plain)}
            case ["transit", "decrypt", "magnatronic"]:
                try:
                    raw = b64decode(said["ciphertext"].removeprefix("vault:v1:"))
                    return 200, {"plaintext": b64encode(self.key.decrypt(raw[:12], raw[12:], None)).decode()}
                except (InvalidTag, ValueError):
                    return 400, ["invalid ciphertext: unable to decrypt"]
            case ["transit", "hmac", "magnatronic"] if self.has_transit_key:
                assert said["key_version"] == 1
                digest = hmac.digest(self.hashing, b64decode(said["input"]), "sha256")
                return 200, {"hmac": "vault:v1:" + b64encode(digest).decode()}
            case ["secret", "data", place]:
                return self._entry(method, place, said)
            case ["secret", "metadata", place] if method == "DELETE":
                self.entries.pop(place, None)
                return 204, None
        return 404, []

    def broken(self) -> bool:
        if self.breaks_after is None:
            return False
        self.breaks_after -= 1
        return self.breaks_after < 0

    def _wrap(self, plain: bytes) -> str:
        nonce = secrets.token_bytes(12)
        return "vault:v1:" + b64encode(nonce + self.key.encrypt(nonce, plain, None)).decode()

    def _entry(self, method: str, place: str, said: dict[str, Any]) -> tuple[int, Any]:
        known = self.entries.get(place)
        if method == "GET":
            if known is None:
                return 404, []
            return 200, {"data": known[0], "metadata": {"version": known[1]}}
        version = 0 if known is None else known[1]
        if said.get("options", {}).get("cas", version) != version:
            return 400, ["check-and-set parameter did not match the current version"]
        self.entries[place] = said["data"], version + 1
        return 200, {"version": version + 1}


class _Handler(BaseHTTPRequestHandler):
    server: VaultServer
    protocol_version = "HTTP/1.1"

    def _handle(self) -> None:
        said = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or b"{}")
        with self.server.lock:
            self.server.calls.append(f"{self.command} {self.path}")
            if self.server.failures:
                status = self.server.failures.pop(0)
                answer: Any = ["told to fail"]
            elif self.server.broken():
                status, answer = 400, ["told to break"]
            elif self.headers.get("X-Vault-Token") != TOKEN:
                status, answer = 403, ["permission denied"]
            else:
                status, answer = self.server.answer(self.command, self.path.removeprefix("/v1"), said)
        body = b"" if answer is None else json.dumps({"errors" if status >= 400 else "data": answer}).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST = do_DELETE = _handle  # noqa: N815 - names that the base class looks for

    def log_message(self, *_: Any) -> None:
        """Nothing."""
