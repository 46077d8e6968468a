"""Script: read array_record files, given as a JSON list of [path, expected number of records, read all].

`check.run_probe` runs it in a process of its own: the reader is compiled code, and may be damaged or missing.
"""

import json
import sys

RECORDS_PER_READ = 1024


def problem_of(path: str, expected: int, read_all: bool) -> str | None:
    """Return what is wrong with a file; None if nothing is.

    A truncated file has no records; where bytes are damaged, the reader returns fewer than there are.
    """
    from array_record.python.array_record_module import ArrayRecordReader

    reader = ArrayRecordReader(path)
    count = reader.num_records()
    if count != expected:
        return f"has {count} records instead of {expected}: truncated or damaged"
    if not count:
        return None
    if read_all:
        ranges = [range(i, min(i + RECORDS_PER_READ, count)) for i in range(0, count, RECORDS_PER_READ)]
    else:
        ranges = [range(1), range(count - 1, count)]
    num_read = sum(len(reader.read(list(indices))) for indices in ranges)
    num_wanted = sum(map(len, ranges))
    return None if num_read == num_wanted else f"only {num_read} of {num_wanted} records can be read: damaged"


def main() -> None:
    for path, expected, read_all in json.loads(sys.argv[1]):
        print(json.dumps({"begin": f"reading {path}"}), flush=True)
        try:
            problem = problem_of(path, expected, read_all)
        except (RuntimeError, ValueError, OSError, IndexError) as error:
            problem = f"cannot be read: {error}"
        print(json.dumps({"path": path, "problem": problem}), flush=True)


if __name__ == "__main__":
    main()
