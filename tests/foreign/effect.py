"""An effect that can be counted: appends `<task id> <attempt>` to a file, then takes its time.

usage: effect.py LEDGER MILLIS      it ends after that time
       effect.py LEDGER hold GATE   it ends when the file GATE is there, or GATE.N if it has written
                                    line N of LEDGER; or when LEDGER is gone
"""

import os
import sys
import time

ledger, how = sys.argv[1:3]
line = f"{os.environ['GARENNE_TASK_ID']} {os.environ['GARENNE_ATTEMPT']}\n"
with open(ledger, "ab", buffering=0) as file:
    # One write to a file opened for appending: concurrent lines do not mix.
    file.write(line.encode())
    end = file.tell()
if how == "hold":
    with open(ledger, "rb") as file:
        number = file.read(end).count(b"\n")
    gates = [sys.argv[3], f"{sys.argv[3]}.{number}"]
    # The ledger goes with its test, which must leave no process behind.
    while os.path.exists(ledger) and not any(map(os.path.exists, gates)):
        time.sleep(0.02)
else:
    time.sleep(int(how) / 1000)
print('"done"')
