"""One stand-in of an object store for the whole session: the clients keep the address that they saw first."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from typing import Any

import fsspec
import pytest

from inranker_jax import paths
from tests.remote.object_store import ObjectStore

AWS = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


def environment(url: str, cache: str) -> dict[str, str]:
    """What sends gcsfs, google-cloud-storage and TensorStore to the stand-in, and nobody else anywhere."""
    return {
        "STORAGE_EMULATOR_HOST": url,
        "TENSORSTORE_GCS_HTTP_URL": url,
        "FSSPEC_GCS_TOKEN": "anon",
        # Asking for the kind of a bucket goes to Google over gRPC, whatever the host.
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        # TensorStore looks for the machine's own account there first.
        "GCE_METADATA_ROOT": "127.0.0.1:1",
        "GCE_METADATA_HOST": "127.0.0.1:1",
        "NO_GCE_CHECK": "true",
        "GOOGLE_CLOUD_PROJECT": "test",
        paths.CACHE_VARIABLE: cache,
    }


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    before = dict(os.environ)
    configured = {key: dict(value) for key, value in fsspec.config.conf.items()}
    with ObjectStore("bkt") as running:
        os.environ.update(environment(running.url, str(tmp_path_factory.mktemp("copies"))))
        fsspec.config.conf["gcs"] = {**fsspec.config.conf.get("gcs", {}), "token": "anon"}
        yield running
    os.environ.clear()
    os.environ.update(before)
    fsspec.config.conf.clear()
    fsspec.config.conf.update(configured)


@pytest.fixture
def store(server: ObjectStore) -> Iterator[ObjectStore]:
    """The stand-in with one empty bucket, `bkt`."""
    yield server
    server.buckets.clear()
    server.buckets["bkt"] = {}
    server.requests.clear()
    server.fault = lambda method, name: None


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """moto's S3, and a client of it."""
    import botocore.session
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    running = ThreadedMotoServer("127.0.0.1", port=0)
    running.start()
    _, port = running.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in AWS.items():
            patch.setenv(name, value)
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        patch.setenv(paths.CACHE_VARIABLE, str(tmp_path_factory.mktemp("copies")))
        yield botocore.session.get_session().create_client("s3")
    running.stop()


@pytest.fixture
def s3(s3_server: Any) -> Iterator[Any]:
    """A client of an S3 with one empty bucket, `bkt3`."""
    s3_server.create_bucket(Bucket="bkt3")
    yield s3_server
    for found in s3_server.list_objects_v2(Bucket="bkt3").get("Contents", []):
        s3_server.delete_object(Bucket="bkt3", Key=found["Key"])
    s3_server.delete_bucket(Bucket="bkt3")
