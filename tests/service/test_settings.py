import socket

import pytest
import typer
from typer.testing import CliRunner

import limner
from service.settings import SECRETS, Settings, SettingsError, load_settings, read_flags, unknown_variables
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


def test_help_shows_every_setting_and_what_it_trades():
    told = run(limner.app, ["serve", "--help"], env={"COLUMNS": "2000"})
    assert told.exit_code == 0
    for name, field in Settings.model_fields.items():
        assert field.description, name
        assert field.description in told.output, name
        assert f"LIMNER_{name.upper()}" in told.output
        assert (f"--{name.replace('_', '-')} " in told.output) == (name not in SECRETS)
    assert "[LIMNER_MAX_BATCH, default 8]" in told.output


def test_every_setting_is_a_flag_but_the_secrets():
    flags = read_flags(["--model", "toy", "--max-batch=3", "--url-ports", "443", "--api-keys-file", "keys"])
    assert flags == {"default_model": "toy", "max_batch": "3", "url_ports": "443", "api_keys_file": "keys"}
    assert read_flags([]) == {}
    for wrong in (["--api-keys", "secret"], ["--max-bat", "3"], ["stray"], ["--port"]):
        with pytest.raises(SystemExit) as caught:
            read_flags(wrong)
        assert caught.value.code == 2


def test_lists_are_separated_by_commas(monkeypatch):
    monkeypatch.setenv("LIMNER_CORS_ORIGINS", "https://a.test , https://b.test,")
    assert load_settings(url_ports="443,8443").url_ports == (443, 8443)
    assert load_settings().cors_origins == ("https://a.test", "https://b.test")
    with pytest.raises(SettingsError, match="LIMNER_CORS_ORIGINS = ',': .*set and holds nothing"):
        load_settings(cors_origins=",")


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


def test_an_empty_directory_is_refused_unless_it_is_looked_at_again(tmp_path):
    limner._check_bundles(Settings(bundles=tmp_path, poll_seconds=1))
    with pytest.raises(typer.Exit):
        limner._check_bundles(Settings(bundles=tmp_path))


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
