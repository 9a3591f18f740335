"""The batch file: its lines (intake), each as an envelope around a body, checked, to a row."""
