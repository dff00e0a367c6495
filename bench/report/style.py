"""The report's style sheet, light and dark."""

STYLE = """
:root{--bg:#fff;--fg:#1c2430;--dim:#66707d;--line:#e3e7ec;--card:#f6f8fa;--ok:#1a7f4b;--warn:#a86b00;--bad:#c0322b;
--c0:#2563c9;--c1:#d9730d;--c2:#1a8a5a;--c3:#8b45c4;--c4:#b8336a;--c5:#5b6470;--shade:#2563c910}
@media(prefers-color-scheme:dark){:root{--bg:#12161c;--fg:#e4e8ee;--dim:#929dab;--line:#2a313b;--card:#1a2028;--ok:#4cc38a;
--warn:#e0a33a;--bad:#f0716a;--c0:#6aa2ff;--c1:#f5a35c;--c2:#54c795;--c3:#bb8af0;--c4:#ef7fab;
--c5:#a2acb9;--shade:#6aa2ff14}}
body{background:var(--bg);color:var(--fg);font:15px/1.5 system-ui,sans-serif;margin:0}
main{max-width:1320px;margin:0 auto;padding:24px}
h1{font-size:22px;margin:0}h2{font-size:17px;margin:24px 0 8px}.dim{color:var(--dim);margin:2px 0 16px}
.verdict{border-left:4px solid;padding:8px 16px;background:var(--card);border-radius:4px}
.verdict h2{margin:0}.verdict ul{margin:4px 0;padding-left:18px}
.valid{border-color:var(--ok)}.doubtful{border-color:var(--warn)}.invalid{border-color:var(--bad)}
.valid h2{color:var(--ok)}.doubtful h2{color:var(--warn)}.invalid h2{color:var(--bad)}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:10px;margin:16px 0}
.cards div{background:var(--card);border-radius:6px;padding:10px 14px}
.cards b{display:block;font-size:18px;font-variant-numeric:tabular-nums}.cards span{color:var(--dim);font-size:13px}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(480px,100%),1fr));gap:14px}
svg{width:100%;background:var(--card);border-radius:6px}
svg path{fill:none;stroke-width:1.5}svg .grid{stroke:var(--line);stroke-width:1}
svg .axis{stroke:var(--dim);stroke-width:1}
svg .title{fill:var(--fg);font-size:13px;font-weight:600}
svg .tick{fill:var(--dim);font-size:11px}svg .shade{fill:var(--shade)}
.s0{stroke:var(--c0)}.s1{stroke:var(--c1)}.s2{stroke:var(--c2)}
.s3{stroke:var(--c3)}.s4{stroke:var(--c4)}.s5{stroke:var(--c5)}
.f0{fill:var(--c0)}.f1{fill:var(--c1)}.f2{fill:var(--c2)}
.f3{fill:var(--c3)}.f4{fill:var(--c4)}.f5{fill:var(--c5)}
.bad{stroke:var(--bad)}
.wide{overflow-x:auto;margin:16px 0}
table{border-collapse:collapse;font-size:13.5px;font-variant-numeric:tabular-nums}
caption{text-align:left;font-weight:600;padding:4px 0}
td:not(:first-child):not(:last-child){white-space:nowrap}
th,td{padding:4px 12px;border-bottom:1px solid var(--line);text-align:right}
th{color:var(--dim);font-weight:500}th:first-child,td:first-child{text-align:left;padding-left:0}
pre{background:var(--card);padding:12px;border-radius:6px;overflow-x:auto;font-size:12.5px}
summary{cursor:pointer;color:var(--dim);padding:4px 0}
"""
