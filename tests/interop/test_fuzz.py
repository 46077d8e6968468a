from tests.helpers.fuzz import Summary, run


def test_damaged_files_are_read_or_raise_an_error_that_names_the_file():
    """A longer run: python -m tests.helpers.fuzz --seconds=600 --seed=1"""
    summary = Summary()
    run(seed=0, first=0, count=500, on_result=summary.add)
    assert not summary.failures, "\n".join([str(summary), *summary.failures])
    assert summary.outcomes.total() == 500 and summary.outcomes["tensors"] > 50
