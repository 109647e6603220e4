"""A bucket on this machine: what stands in for Cloud Storage, over real HTTP to the real clients (gcsfs and TensorStore).

It serves objects from memory: gcp-storage-emulator, with what it lacks: moving, and generations. TensorStore and the lock of a run rely on
them: a write may ask for the generation that it replaces, 0 for none. What this does not show: rights, slowness, errors that go away
when tried again, buckets with hierarchical names.
"""

import contextlib
import http.server
import sys
import threading
from http import HTTPStatus

from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import objects

NAME = "bucket"
_insert, _download = objects.insert, objects.download
_one_at_a_time = threading.Lock()


def generation(storage, name: str) -> str:
    """Of an object; 0 where there is none."""
    with contextlib.suppress(NotFound):
        return storage.get_file_obj(NAME, name)["generation"]
    return "0"


def insert(request, response, storage, *words, **named):
    """Only in place of the generation that the request names."""
    asked = request.query.get("ifGenerationMatch")
    name = request.query["name"][0] if "name" in request.query else request.data["meta"]["name"]
    if asked and asked[0] != generation(storage, name):
        response.status = HTTPStatus.PRECONDITION_FAILED
    else:
        _insert(request, response, storage, *words, **named)


def download(request, response, storage, *words, **named):
    """With the generation, unless the request names it as known."""
    now = generation(storage, request.params["object_id"])
    if request.query.get("ifGenerationNotMatch") == [now]:
        response.status = HTTPStatus.NOT_MODIFIED
        return
    response["x-goog-generation"] = now
    _download(request, response, storage, *words, **named)


def move(request, response, storage, *words, **named):
    """An object to another name; the emulator can only copy."""
    request.params["dest_bucket_name"] = request.params["bucket_name"]
    objects.copy(request, response, storage)
    if response.status == HTTPStatus.OK:
        objects.delete(request, response, storage)


class Threads(http.server.ThreadingHTTPServer):
    """TensorStore opens dozens of connections at once; the emulator's own server answers one after another."""

    request_queue_size = 256
    daemon_threads = True


# Before the table of handlers is made.
objects.insert, objects.download, http.server.HTTPServer = insert, download, Threads

from gcp_storage_emulator import server  # noqa: E402

MOVE = r"^/storage/v1/b/(?P<bucket_name>[-.\w]+)/o/(?P<object_id>.+)/moveTo/o/(?P<dest_object_id>.+)$"
_handle = server.Router.handle


def handle(router, method) -> None:
    """The emulator's objects are not made for threads."""
    with _one_at_a_time:
        _handle(router, method)


server.Router.handle = handle
server.HANDLERS = ((MOVE, {server.POST: move}), *server.HANDLERS)

if __name__ == "__main__":
    serving = server.create_server("127.0.0.1", int(sys.argv[1]), in_memory=True, default_bucket=NAME)
    serving.start()
    print("ready", flush=True)
    sys.stdin.read()  # until whoever started it ends
    serving.stop()
