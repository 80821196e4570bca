"""S3-compatible object storage on this machine, as a process of its own: moto's server.

Run as a program, with ``--port``. S3 promises that of two conditional writes of an object one wins;
moto looks first and writes afterwards, so that writes are let in one at a time.
"""

import logging
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import requests

from tests.servers import serving

BUCKET = "bragg"
SECRET = "canary-0d5f1c"  # of the access key: never to be found in a file


@contextmanager
def object_storage() -> Iterator[str]:
    """Serve an empty bucket, which the standard variables of the environment lead to."""
    with serving(__name__, answers="moto-api/") as address, pytest.MonkeyPatch.context() as patch:
        requests.put(f"{address}/{BUCKET}", timeout=10).raise_for_status()
        patch.setenv("AWS_ENDPOINT_URL", address)
        patch.setenv("AWS_ACCESS_KEY_ID", "tester")
        patch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        yield address


def main(port: int) -> None:
    from moto.server import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
    from werkzeug.serving import run_simple

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    application, writing = DomainDispatcherApplication(create_backend_app), threading.Lock()

    def serialised(environ, start_response):
        if environ["REQUEST_METHOD"] in ("GET", "HEAD"):
            return application(environ, start_response)
        with writing:
            return list(application(environ, start_response))

    run_simple("127.0.0.1", port, serialised, threaded=True, request_handler=MotoRequestHandler)


if __name__ == "__main__":
    main(int(sys.argv[-1]))
