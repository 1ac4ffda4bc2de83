import socket

import pytest
from typer.testing import CliRunner

import limner
from service.settings import Settings, SettingsError, load_settings, unknown_variables
from tests.service.toy import write_bundle

run = CliRunner().invoke


def test_environment_and_flags(monkeypatch):
    monkeypatch.setenv("LIMNER_MAX_BATCH", "3")
    monkeypatch.setenv("LIMNER_PORT", "9000")
    settings = load_settings(port=9001, host=None)
    assert (settings.max_batch, settings.port, settings.host) == (3, 9001, "127.0.0.1")


def test_wrong_values_are_told_one_line_each(monkeypatch):
    monkeypatch.setenv("LIMNER_MAX_BATCH", "many")
    with pytest.raises(SettingsError) as caught:
        load_settings(engine="quantum")
    lines = str(caught.value).splitlines()
    assert len(lines) == 2
    assert any("LIMNER_MAX_BATCH = 'many'" in line for line in lines)
    assert any("LIMNER_ENGINE = 'quantum'" in line for line in lines)


def test_misspelt_variables_are_noticed(monkeypatch):
    monkeypatch.setenv("LIMNER_MAX_BACTH", "3")
    assert "LIMNER_MAX_BACTH" in unknown_variables()


def test_every_setting_says_what_it_trades():
    for name, field in Settings.model_fields.items():
        assert field.description, name


def test_serve_refuses_in_words(tmp_path, monkeypatch):
    nothing = run(limner.app, ["serve", "--bundles", str(tmp_path)])
    assert nothing.exit_code == 2
    assert "no bundle under" in nothing.output
    wrong = run(limner.app, ["serve", "--engine", "quantum"])
    assert wrong.exit_code == 2
    assert "LIMNER_ENGINE = 'quantum'" in wrong.output
    write_bundle(tmp_path)
    absent = run(limner.app, ["serve", "--bundles", str(tmp_path), "--model", "other"])
    assert "not among the bundles: toy" in absent.output
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        refused = run(limner.app, ["serve", "--bundles", str(tmp_path), "--port", str(port)])
    assert refused.exit_code == 2
    assert f"cannot listen on 127.0.0.1 port {port}" in refused.output


def test_models_lists_bundles(tmp_path):
    write_bundle(tmp_path)
    listed = run(limner.app, ["models", "--bundles", str(tmp_path)], env={"COLUMNS": "200"})
    assert listed.exit_code == 0
    assert "toy" in listed.output
    assert "bbox 0.500" in listed.output


@pytest.mark.parametrize("verb", [["train"], ["evaluate"], ["export", "onnx"]])
def test_verbs_that_need_an_extra_say_which(verb, monkeypatch):
    def missing(module):
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    monkeypatch.setattr(limner, "import_module", missing)
    answer = run(limner.app, [*verb, "--help"])
    assert answer.exit_code == 2
    assert 'pip install -e ".[' in answer.output


def test_verbs_pass_their_arguments_on(monkeypatch):
    seen = []

    class Module:
        @staticmethod
        def main(arguments):
            seen.append(arguments)
            return 3

    monkeypatch.setattr(limner, "import_module", lambda name: Module)
    answer = run(limner.app, ["train", "--help", "--steps", "5", "name"])
    assert answer.exit_code == 3
    assert seen == [["--help", "--steps", "5", "name"]]
