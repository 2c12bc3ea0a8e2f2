#!/usr/bin/env python3
"""A client for kmsd in the Python standard library, written from docs/protocol.md alone.

    kmsd_client.py [--socket PATH] whoami
    kmsd_client.py [--socket PATH] demo NAMESPACE

demo makes two keys, signs and verifies, encrypts and decrypts. Use the parts you need; there is nothing else to install.
"""

import json
import os
import socket
import struct
import sys

# MessagePack: the part of it that the protocol uses (docs/protocol.md section 2).


def pack(v):
    if v is None:
        return b"\xc0"
    if isinstance(v, bool):  # before int, of which bool is a kind
        return b"\xc3" if v else b"\xc2"
    if isinstance(v, int):
        if 0 <= v < 0x80:
            return struct.pack("B", v)
        return struct.pack(">Bq", 0xD3, v) if v < 0 else struct.pack(">BQ", 0xCF, v)
    if isinstance(v, str):
        b = v.encode()
        return (struct.pack("B", 0xA0 | len(b)) if len(b) < 32 else struct.pack(">BI", 0xDB, len(b))) + b
    if isinstance(v, (bytes, bytearray)):
        return struct.pack(">BI", 0xC6, len(v)) + bytes(v)
    if isinstance(v, (list, tuple)):
        return struct.pack(">BI", 0xDD, len(v)) + b"".join(map(pack, v))
    if isinstance(v, dict):
        return struct.pack(">BI", 0xDF, len(v)) + b"".join(pack(k) + pack(x) for k, x in v.items())
    raise TypeError(type(v))


def unpack(b, at=0, depth=16):
    """Returns the value that begins at b[at], and where the next one begins."""

    def take(n):
        nonlocal at
        if at + n > len(b):
            raise ValueError("message ends early")
        at += n
        return b[at - n : at]

    def number(form):
        return struct.unpack(">" + form, take(struct.calcsize(form)))[0]

    def items(n):
        nonlocal at
        if depth == 0 or n > len(b) - at:
            raise ValueError("nested too deeply, or ends early")
        values = []
        for _ in range(n):
            v, at = unpack(b, at, depth - 1)
            values.append(v)
        return values

    def pairs(n):
        flat = items(2 * n)
        return dict(zip(flat[::2], flat[1::2]))

    c = number("B")
    if c < 0x80:
        return c, at
    if c >= 0xE0:
        return c - 0x100, at
    for low, high, read in ((0x80, 0x8F, pairs), (0x90, 0x9F, items), (0xA0, 0xBF, lambda n: take(n).decode())):
        if low <= c <= high:
            v = read(c - low)
            return v, at
    simple = {0xC0: None, 0xC2: False, 0xC3: True}
    if c in simple:
        return simple[c], at
    integers = {0xCC: "B", 0xCD: "H", 0xCE: "I", 0xCF: "Q", 0xD0: "b", 0xD1: "h", 0xD2: "i", 0xD3: "q"}
    if c in integers:
        v = number(integers[c])
        return v, at
    sized = {0xC4: ("B", take), 0xC5: ("H", take), 0xC6: ("I", take), 0xDC: ("H", items), 0xDD: ("I", items), 0xDE: ("H", pairs), 0xDF: ("I", pairs)}
    sized.update({code: (form, lambda n: take(n).decode()) for code, form in ((0xD9, "B"), (0xDA, "H"), (0xDB, "I"))})
    if c not in sized:
        raise ValueError("code 0x%02x is not used in this protocol" % c)
    form, read = sized[c]
    v = read(number(form))
    return v, at


# The connection (sections 1, 3 and 4).


class KmsdError(Exception):
    """An answer that is an error. code is stable, the text is for people."""

    def __init__(self, error):
        super().__init__("%s: %s" % (error.get("code"), error.get("message", "")))
        self.code = error.get("code")
        self.error = error


class Kmsd:
    """One connection, used by one thread, one request after the other."""

    def __init__(self, path=None):
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.settimeout(60)
        self.socket.connect(path or default_path())
        self.id = 0
        self.hello = self.call("hello", min_version=1, max_version=1, client="kmsd_client.py 1")
        self.call("bind", nonce=self.hello["nonce"])

    def call(self, op, options=None, **params):
        """Runs an operation. Parameters whose value is None are left out."""
        self.id += 1
        message = [0, self.id, op, {k: v for k, v in params.items() if v is not None}]
        if options:
            message.append(options)
        frame = pack(message)
        self.socket.sendall(struct.pack(">I", len(frame)) + frame)
        while True:
            size = struct.unpack(">I", self.read(4))[0]
            if size > (1 << 20) + 4096:
                raise ValueError("frame of %d bytes" % size)
            (kind, id, error, result), _ = unpack(self.read(size))
            if kind != 1 or id not in (0, self.id):
                continue
            if error is not None:
                raise KmsdError(error)
            return result

    def read(self, n):
        b = bytearray()
        while len(b) < n:
            piece = self.socket.recv(n - len(b))
            if not piece:
                raise ConnectionError("kmsd closed the connection")
            b += piece
        return bytes(b)

    # The operations (section 9) that this program uses. The others are called in the same way.

    def create(self, name, algorithm, usage=None):
        # With a request key a creation may be repeated after a lost connection (section 6).
        return self.call("key_create", {"request_key": os.urandom(16)}, name=name, algorithm=algorithm, usage=usage)

    def sign(self, key, data, scheme=None):
        return self.call("sign", key=key, data=data, scheme=scheme)["signature"]

    def verify(self, key, data, signature, scheme=None):
        """True if the signature is right."""
        try:
            self.call("verify", key=key, data=data, signature=signature, scheme=scheme)
            return True
        except KmsdError as e:
            if e.code == "verification_failed":
                return False
            raise

    def encrypt(self, key, data, aad=b""):
        return self.call("encrypt", key=key, data=data, aad=aad)["ciphertext"]

    def decrypt(self, key, ciphertext, aad=b""):
        # An empty plaintext is a field that is left out (section 2).
        return self.call("decrypt", key=key, ciphertext=ciphertext, aad=aad).get("data", b"")


def default_path():
    if os.environ.get("KMSD_SOCKET"):
        return os.environ["KMSD_SOCKET"]
    own = os.path.join(os.environ.get("XDG_RUNTIME_DIR", ""), "kmsd", "kmsd.sock")
    return own if os.path.exists(own) else "/run/kmsd/kmsd.sock"


def demo(kmsd, namespace):
    signing, sealing = namespace + "/signing", namespace + "/sealing"
    made = kmsd.create(signing, "ecdsa-p256")
    print("made", made["name"], made["algorithm"], "version", made["current"])
    signature = kmsd.sign(signing, b"a contract")
    print("signature of", len(signature), "bytes")
    assert kmsd.verify(signing, b"a contract", signature)
    assert not kmsd.verify(signing, b"another contract", signature)

    kmsd.create(sealing, "aes-256-gcm")
    for data in (b"", b"a secret", os.urandom(50000)):
        sealed = kmsd.encrypt(sealing, data, b"context")
        assert sealed.startswith(b"kms\x01") and data not in (sealed,)
        assert kmsd.decrypt(sealing, sealed, b"context") == data
        try:
            kmsd.decrypt(sealing, sealed, b"other context")
            raise AssertionError("decrypted with other additional data")
        except KmsdError as e:
            assert e.code == "decryption_failed", e
    try:
        kmsd.sign(namespace + "/none", b"x")
        raise AssertionError("signed with a key that is not there")
    except KmsdError as e:
        assert e.code == "not_available", e
    print("ok")


def main():
    args = sys.argv[1:]
    path = None
    if args[:1] == ["--socket"]:
        path, args = args[1], args[2:]
    if args == ["whoami"]:
        print(json.dumps(Kmsd(path).call("whoami")))
    elif len(args) == 2 and args[0] == "demo":
        demo(Kmsd(path), args[1])
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main()
