"""The results file of a job, and the files beside it (side_files.py). Its life:

1. `Files.claim` looks whether the file can be written, and takes `<output>.claim` (claim.py).
2. `Opening.look` reads back which rows have a line (answered.py), and checks `<output>.meta.json`
   (meta.py): it must be the same job. `Opening.begin` drops the lines that are to be answered anew.
3. `Journal` appends a line (answers/line.py) for each row that ends, and puts it on the disk.
4. A run that is stopped saves what it has made of other rows (unfinished.py) for its rerun.
5. A run that ends may put the lines into the order of the input (order.py). It gives up the claim.
6. A rerun begins at 1; rows that have a line are passed over, whatever ended the run before.
"""
