"""The look of the page. Light and dark by the reader's setting; paper is always light."""

from __future__ import annotations

CSS = """
:root {
  color-scheme: light dark;
  --page: #f6f7f8; --card: #ffffff; --ink: #14181d; --soft: #5b6570; --line: #e3e6e9;
  --before: #ccd3da; --after: #2468ad; --s2: #c0701d; --s3: #6c55b8; --s4: #23856d;
  --good: #1b7446; --good-tint: #e3f3ea; --bad: #a8471f; --bad-tint: #fbebe2; --hover: #14181d0f;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #0e1114; --card: #161a1f; --ink: #e8ebee; --soft: #98a3ae; --line: #2a3037;
    --before: #46505b; --after: #5ba6ee; --s2: #e3a055; --s3: #a797ee; --s4: #5cc2a8;
    --good: #62ca92; --good-tint: #15301f; --bad: #f0946f; --bad-tint: #38211a; --hover: #ffffff14;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 ui-sans-serif, system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  font-variant-numeric: tabular-nums; -webkit-text-size-adjust: 100%;
}
main { max-width: 1180px; margin: 0 auto; padding: 44px 24px 64px; }
h1, h2, h3, p, dl, dd, figure, ul { margin: 0; padding: 0; }
h1 { font-size: 34px; line-height: 1.15; letter-spacing: -0.022em; font-weight: 680; overflow-wrap: anywhere; }
h2 { font-size: 19px; letter-spacing: -0.012em; font-weight: 640; margin: 0 0 4px; }
h3 { font-size: 15px; font-weight: 640; overflow-wrap: anywhere; }
section { margin-top: 40px; }
code, pre { font: 12.5px/1.55 ui-monospace, "SF Mono", Menlo, Consolas, "Liberation Mono", monospace; }
.soft { color: var(--soft); }
.small { font-size: 13px; }
.lead { font-size: 18px; line-height: 1.45; margin-top: 12px; max-width: 46em; }
.chips { display: flex; flex-wrap: wrap; gap: 8px; margin-top: 16px; }
.chip {
  border: 1px solid var(--line); background: var(--card); border-radius: 99px; padding: 2px 11px;
  font-size: 13px; color: var(--soft); overflow-wrap: anywhere;
}
.chip b { font-weight: 560; }
.chip b:not([class]) { color: var(--ink); }
.good { color: var(--good); } .bad { color: var(--bad); }
.badge {
  display: inline-block; border-radius: 5px; padding: 0 7px; font-size: 13px; line-height: 21px; font-weight: 560;
  white-space: nowrap;
}
.badge.good { background: var(--good-tint); } .badge.bad { background: var(--bad-tint); }
.badge.even { background: var(--hover); color: var(--soft); }
.card, .tile { background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
.card { padding: 20px 22px; margin-top: 14px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(210px, 1fr)); gap: 14px; margin-top: 30px; }
.tile { padding: 16px 18px 17px; display: flex; flex-direction: column; }
.tile .top { display: flex; justify-content: space-between; gap: 8px; color: var(--soft); font-size: 13.5px; }
.tile .value { font-size: 29px; line-height: 1.25; letter-spacing: -0.024em; font-weight: 640; margin-top: 7px; }
.tile .value.none { font-size: 20px; line-height: 36px; font-weight: 400; color: var(--soft); letter-spacing: 0; }
.tile .value small { font-size: 16px; font-weight: 500; letter-spacing: 0; margin-left: 4px; color: var(--soft); }
.tile .from { color: var(--soft); font-size: 13px; margin-bottom: 12px; }
.meter { height: 4px; border-radius: 2px; background: var(--before); margin-top: auto; overflow: hidden; }
.meter i { display: block; height: 100%; background: var(--after); }
.key { display: flex; flex-wrap: wrap; gap: 4px 16px; font-size: 13px; color: var(--soft); }
.key i { display: inline-block; width: 10px; height: 10px; border-radius: 2px; margin-right: 6px; }
.key b { color: var(--ink); font-weight: 560; }
svg { display: block; max-width: 100%; height: auto; overflow: visible; }
svg .tip path { fill: transparent !important; pointer-events: all; }
svg .tip:hover path { fill: var(--hover) !important; }
.wide { overflow-x: auto; }
.wide svg { min-width: 760px; width: 100%; }
.maps svg { min-width: 0; width: auto; background: var(--hover); shape-rendering: crispEdges; margin: 4px 0; }
.curves { display: grid; grid-template-columns: repeat(auto-fill, minmax(310px, 1fr)); gap: 26px 30px; }
.curves { margin-top: 22px; }
.curves figcaption { margin-bottom: 6px; min-height: 42px; }
.curves figcaption strong { display: block; font-size: 13.5px; font-weight: 600; }
.curves svg { width: 100%; max-width: 400px; }
.head { display: flex; flex-wrap: wrap; align-items: baseline; gap: 4px 12px; }
.facts { display: flex; flex-wrap: wrap; gap: 6px 36px; }
.facts dt { font-size: 13px; color: var(--soft); }
.facts dd { font-weight: 560; }
.facts .was { font-weight: 400; font-size: 13px; }
h3 + .facts { margin-top: 10px; }
.notes { margin: 12px 0 0; padding-left: 18px; }
.notes li { margin-top: 3px; overflow-wrap: anywhere; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; }
th { text-align: left; font-weight: 500; color: var(--soft); font-size: 12.5px; border-bottom: 1px solid var(--line); }
th, td { padding: 5px 14px 5px 0; white-space: nowrap; }
td { border-bottom: 1px solid color-mix(in srgb, var(--line) 55%, transparent); }
tr:last-child td { border-bottom: 0; }
tbody tr:hover td { background: var(--hover); }
.right { text-align: right; }
th:last-child, td:last-child { padding-right: 0; }
td.name { max-width: 300px; overflow: hidden; text-overflow: ellipsis; font-weight: 560; }
td.name small { font-weight: 400; font-size: 12.5px; color: var(--soft); }
.was { color: var(--soft); }
.bar { display: block; height: 8px; border-radius: 2px; background: var(--before); min-width: 1px; }
.bar i { display: block; height: 100%; border-radius: 2px; background: var(--after); }
td.plot { width: 24%; min-width: 130px; }
details { margin-top: 14px; }
summary { cursor: pointer; color: var(--soft); font-size: 13px; }
.pairs { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: 3px 22px; margin-top: 10px; }
.pairs { font-size: 13.5px; }
.pairs dt { color: var(--soft); }
.pairs dd, pre { overflow-wrap: anywhere; }
.two { display: grid; grid-template-columns: repeat(auto-fit, minmax(330px, 1fr)); gap: 14px; }
.two .card { margin-top: 0; }
.two { margin-top: 14px; }
pre { margin: 10px 0 0; white-space: pre-wrap; }
footer { margin-top: 44px; color: var(--soft); font-size: 13px; }
@media (max-width: 640px) { .tiles { grid-template-columns: repeat(auto-fit, minmax(170px, 1fr)); } }
@media (max-width: 640px) { main { padding: 28px 16px 40px; } h1 { font-size: 27px; } .card { padding: 16px; } }
@media print {
  :root {
    color-scheme: light;
    --page: #ffffff; --card: #ffffff; --ink: #14181d; --soft: #5b6570; --line: #d9dde1;
    --before: #ccd3da; --after: #2468ad; --s2: #c0701d; --s3: #6c55b8; --s4: #23856d;
    --good: #1b7446; --good-tint: #e3f3ea; --bad: #a8471f; --bad-tint: #fbebe2; --hover: transparent;
  }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  main { padding: 0; max-width: none; }
  body { font-size: 12px; }
  .tile, figure, tr, .wide { break-inside: avoid; }
  h2, h3 { break-after: avoid; }
  thead { display: table-header-group; }
  .tiles { grid-template-columns: repeat(4, 1fr); gap: 8px; }
  .wide { overflow: visible; } .wide svg { min-width: 0; }
  details::details-content { content-visibility: visible; block-size: auto; }
}
"""
