"""From the rows of a batch file to the lines of a results file, on rank 0 only.

input/    a line of the batch file → a row → the requests of its answers
answers/  the results of these requests → the line of an answered row, or of an error row
results/  the results file, which lines are appended to and which a rerun resumes
job.py    joins the three: gives requests to the engine, and takes its results

`status`, `merge` and `sizing` are what the commands of that name, and `validate`, say of the files.
"""
