"""Secrets in URIs: what is hidden, and what is left."""

import pytest

from pave_lightning.credentials import has_secrets, mask_values, masked, without_secrets

HIDDEN = {
    "http://user:hunter2@host:5000/api": "http://user:***@host:5000/api",
    "https://user:hunt@er2@host/": "https://user:***@host/",
    "postgresql+psycopg2://user:hunt%40er2@host:5432/db": "postgresql+psycopg2://user:***@host:5432/db",
    "postgresql://user:hunt/er2@host/db": "postgresql://user:***@host/db",
    "http://user:hunt?er2@host": "http://user:***@host",
    "http://user:hunt#er2@host": "http://user:***@host",
    "http://user:hu@nt?er2@host": "http://user:***@host",
    "https://hunter2@host/repository": "https://***@host/repository",
    "https://:hunter2@host/": "https://:***@host/",
    "https://host/mlflow?token=hunter2": "https://host/mlflow?token=***",
    "https://host/?a=1&Access_Token=hunter2&b=2": "https://host/?a=1&Access_Token=***&b=2",
    "mysql://host/db?user=me&password=hunter2": "mysql://host/db?user=me&password=***",
    "https://host/#sig=hunter2": "https://host/#sig=***",
    "s3://bucket/a?X-Amz-Credential=hunter2&X-Amz-Signature=hunter2": (
        "s3://bucket/a?X-Amz-Credential=***&X-Amz-Signature=***"
    ),
    "https://host/?api_key=hunter2;apikey=hunter2": "https://host/?api_key=***;apikey=***",
    "mssql+pyodbc:///?odbc_connect=PWD%3Dhunter2": "mssql+pyodbc:///?odbc_connect=***",
}
OPEN = [
    "sqlite:////data/a@b/mlflow.db",
    "sqlite:////data/a:b@c/mlflow.db?timeout=5",
    "http://host:5000/a@b?page=2",
    "http://[::1]:5000/",
    "http://[::1]/a@b",
    "postgresql://user@host/db",
    "https://host/?tokens_per_step",
    "nyu-mll/glue",
    "user:hunter2",
    "",
]


@pytest.mark.parametrize(("uri", "shown"), HIDDEN.items())
def test_secrets_are_hidden(uri, shown):
    assert masked(uri) == shown
    assert masked(shown) == shown
    assert has_secrets(uri)
    assert not has_secrets(shown)
    assert without_secrets(f'cannot open "{uri}", see {uri}\nagain: {uri}') == (
        f'cannot open "{shown}", see {shown}\nagain: {shown}'
    )


@pytest.mark.parametrize("uri", OPEN)
def test_what_holds_no_secret_stays(uri):
    assert masked(uri) == uri
    assert without_secrets(f"cannot open {uri} today") == f"cannot open {uri} today"
    assert not has_secrets(uri)


def test_a_secret_is_hidden_wherever_a_message_quotes_it():
    uri = "postgresql://user:hunt%40er2@host/db"
    told = without_secrets("login with hunt@er2 (hunt%40er2) failed at host", uri)
    assert told == "login with *** (***) failed at host"


def test_plain_values_are_searched_through():
    values = {"a": [{"b": "http://u:p w@h/x"}, 3, None, "two http://u:p@h and http://u:q@h"], "http://u:p@h": True}
    assert mask_values(values) == {
        "a": [{"b": "http://u:***@h/x"}, 3, None, "two http://u:***@h and http://u:***@h"],
        "http://u:***@h": True,
    }
