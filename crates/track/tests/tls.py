#!/usr/bin/env python3
"""Make an authority, a server's certificate and a client's, and relay TLS on 127.0.0.1 to a port there.

    venv/bin/python crates/track/tests/tls.py FOLDER PORT

Needs the package cryptography, which mlflow brings (tested with Python 3.11 and cryptography of mlflow 3.17.2). Writes
ca.pem and client.pem (certificate and key) to FOLDER, prints the port that it listens on, and refuses whoever has no
certificate of the authority. It ends when its standard input does. crates/track/tests/it/rest.rs runs this.
"""

import datetime
import ipaddress
import os
import pathlib
import socket
import ssl
import sys
import threading

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

NOW = datetime.datetime.now(datetime.timezone.utc)


def named(name):
    return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])


def certificate(name, issuer=None, is_authority=False):
    key = ec.generate_private_key(ec.SECP256R1())
    subject = named(name)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer[0].subject if issuer else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(NOW - datetime.timedelta(days=1))
        .not_valid_after(NOW + datetime.timedelta(days=30))
        .add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
    )
    return builder.sign(issuer[1] if issuer else key, hashes.SHA256()), key


def pem(certificate, key=None):
    text = certificate.public_bytes(serialization.Encoding.PEM)
    if key:
        plain = serialization.NoEncryption()
        text += key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)
    return text


def relay(source, target):
    try:
        while data := source.recv(65536):
            target.sendall(data)
    except OSError:
        pass
    finally:
        target.close()


def serve(listener, context, port):
    while True:
        raw, _ = listener.accept()
        try:
            client = context.wrap_socket(raw, server_side=True)
        except (OSError, ssl.SSLError):
            raw.close()
            continue
        server = socket.create_connection(("127.0.0.1", port))
        for pair in ((client, server), (server, client)):
            threading.Thread(target=relay, args=pair, daemon=True).start()


def main():
    folder, port = pathlib.Path(sys.argv[1]), int(sys.argv[2])
    authority = certificate("authority", is_authority=True)
    server, client = certificate("server", authority), certificate("client", authority)
    (folder / "ca.pem").write_bytes(pem(authority[0]))
    (folder / "client.pem").write_bytes(pem(*client))
    (folder / "server.pem").write_bytes(pem(*server))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server.pem")
    context.load_verify_locations(folder / "ca.pem")
    context.verify_mode = ssl.CERT_REQUIRED
    listener = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=serve, args=(listener, context, port), daemon=True).start()
    print(listener.getsockname()[1], flush=True)
    sys.stdin.read()
    os._exit(0)


main()
