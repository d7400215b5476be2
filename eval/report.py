"""Bring evaluated runs together in one HTML file that opens by double click, with figures for a paper beside it.

python eval/report.py runs/lung
python eval/report.py runs/phantom runs/phantom_depth --output reports/phantom.html --sequences 20
"""

from cellflux_bridge.cli import script

if __name__ == "__main__":
    script("report")
