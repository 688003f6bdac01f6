"""An effect that can be counted: appends `<task id> <attempt>` to a file, then takes its time.

usage: effect.py LEDGER MILLIS
"""

import os
import sys
import time

ledger, millis = sys.argv[1:]
line = f"{os.environ['GARENNE_TASK_ID']} {os.environ['GARENNE_ATTEMPT']}\n"
with open(ledger, "ab", buffering=0) as file:
    # One write to a file opened for appending: concurrent lines do not mix.
    file.write(line.encode())
time.sleep(int(millis) / 1000)
print('"done"')
