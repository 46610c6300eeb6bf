"""Lines that the entrypoint has printed go to run.log, and not to the terminal a second time."""

import logging

from trainer.job.run import _log_file, _printed_once


def test_what_was_printed_goes_to_the_file_alone_and_later_repeats_are_news(tmp_path, caplog):
    log = logging.getLogger("trainer.data")
    with caplog.at_level(logging.INFO), _log_file(tmp_path / "run.log") as file:
        with _printed_once(("Images: 5 found.",), file):
            log.info("Images: %d found.", 5)
            log.info("Encoded.")
            log.info("Images: %d found.", 5)
        log.info("Done.")
    assert [record.getMessage() for record in caplog.records] == ["Encoded.", "Images: 5 found.", "Done."]
    assert (tmp_path / "run.log").read_text().count("Images: 5 found.") == 2
