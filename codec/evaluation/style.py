"""How the report looks, and the little that it does: one player at a time, going on where the last one was."""

STYLE = """
:root{color-scheme:light dark;--page:#fbfaf8;--card:#fff;--ink:#1d1f24;--soft:#5c6270;--line:#dddcd6;--link:#1f56a8;
--c0:#1f5fb4;--c1:#c2500a;--c2:#0b8062;--c3:#a8327a;--c4:#7a6200;--c5:#5a48b8;--c6:#b3261e;--c7:#49525f}
@media(prefers-color-scheme:dark){:root{--page:#15171b;--card:#1d2026;--ink:#e8e8e4;--soft:#a2a8b4;--line:#363b45;
--link:#8ab8f8;--c0:#6aa9f7;--c1:#f59a53;--c2:#45cfa5;--c3:#ef8cc8;--c4:#d9bf4e;--c5:#ab9cf7;--c6:#ff8a80;
--c7:#b6bfcc}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:84rem;padding:1.5rem clamp(1rem,4vw,3rem) 4rem;background:var(--page);color:var(--ink);
font:1rem/1.55 system-ui,-apple-system,"Segoe UI","Noto Sans","DejaVu Sans",sans-serif}
h1{font-size:2rem;line-height:1.2;margin:.5rem 0}h2{font-size:1.35rem;margin:3rem 0 .75rem;padding-top:.5rem}
h3{font-size:1rem;margin:0;overflow-wrap:anywhere}p{max-width:46rem}
header p,.note,.who span,figcaption{color:var(--soft)}
a{color:var(--link)}:focus-visible{outline:3px solid var(--link);outline-offset:2px}
.skip{position:absolute;left:-99rem}
.skip:focus{left:1rem;top:.5rem;background:var(--card);padding:.5rem 1rem;z-index:9}
nav ul,.legend,.sounds{list-style:none;padding:0;margin:0}
nav ul,.legend{display:flex;flex-wrap:wrap;gap:.35rem 1.4rem}
.legend{margin:.5rem 0 1rem}.legend li{display:flex;align-items:center;gap:.45rem}
.plots{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,21rem),1fr));gap:1rem}
figure,article,.scroll{margin:0;background:var(--card);border:1px solid var(--line);border-radius:10px}
figure{padding:.75rem .75rem .5rem}figcaption{font-size:.9rem;padding:0 .25rem .25rem}
.plot{display:block;width:100%;height:auto}
.grid{stroke:var(--line);stroke-width:1;fill:none}.tick{font-size:12px;fill:var(--soft)}
.original{stroke:var(--soft);stroke-dasharray:5 4;fill:none}.line{stroke:currentColor;stroke-width:2;fill:none}
.bar{stroke:currentColor;stroke-width:1.5;opacity:.75;fill:none}
.mark{fill:currentColor;stroke:var(--card);stroke-width:1}
.c0{color:var(--c0)}.c1{color:var(--c1)}.c2{color:var(--c2)}.c3{color:var(--c3)}
.c4{color:var(--c4)}.c5{color:var(--c5)}.c6{color:var(--c6)}.c7{color:var(--c7)}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.9rem;width:100%}
caption{text-align:left;color:var(--soft);padding:.7rem .9rem .3rem;font-size:.9rem}
th,td{padding:.4rem .7rem;text-align:right;white-space:nowrap;border-top:1px solid var(--line)}
thead th{border-top:0;vertical-align:bottom;white-space:normal;min-width:5.6rem;font-weight:600;font-size:.85rem}
th:first-child{text-align:left;position:sticky;left:0;background:var(--card);font-weight:600}
tbody tr:hover>*{background:color-mix(in srgb,var(--link) 9%,var(--card))}.reach{color:var(--soft);font-size:.8em}
details{margin-top:.75rem}summary{cursor:pointer;color:var(--link);padding:.25rem 0}details .scroll{margin-top:.5rem}
article{padding:1rem 1.1rem;margin-bottom:1.25rem}.spoken{margin:.35rem 0;font-style:italic}
.spoken:empty{display:none}
.note{margin:.25rem 0 .75rem;font-size:.9rem}
.sounds li{display:grid;grid-template-columns:minmax(8rem,11rem) minmax(15rem,20rem) minmax(0,1fr);gap:.5rem 1rem;
align-items:center;padding:.5rem 0;border-top:1px solid var(--line)}.who span{display:block;font-size:.85rem}
audio{width:100%;height:2.4rem}
.sounds img{width:100%;height:5.5rem;object-fit:fill;border-radius:4px;display:block;background:#080618}
dl div{display:grid;grid-template-columns:11rem minmax(0,46rem);gap:.25rem 1.25rem;padding:.45rem 0;
border-top:1px solid var(--line)}
dt{font-weight:600}dd{margin:0;overflow-wrap:anywhere}
@media(max-width:52rem){body{padding:1rem 1rem 3rem}h1{font-size:1.6rem}
dl div,.sounds li{grid-template-columns:minmax(0,1fr)}
.who span{display:inline;margin-left:.4rem}th,td{padding:.35rem .6rem}}
@media print{nav,audio,.skip{display:none}figure,article{break-inside:avoid}}
"""

SCRIPT = """
for (const article of document.querySelectorAll('article')) {
  const players = [...article.querySelectorAll('audio')];
  let last = null;
  for (const player of players) {
    player.addEventListener('play', () => {
      for (const other of document.querySelectorAll('audio')) if (other !== player) other.pause();
      if (last && last !== player && !last.ended && last.currentTime < player.duration)
        player.currentTime = last.currentTime;
      last = player;
    });
  }
}
"""
