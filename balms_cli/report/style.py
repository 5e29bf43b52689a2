"""The page's style sheet and its one small script. Both stand in the page, and its security policy names their hashes."""

from .palette import DARK, LIGHT


def _variables(colours: dict[str, str]) -> str:
    return "".join(f"--{name}:{colour};" for name, colour in colours.items())


_SHEET = """
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;text-size-adjust:100%;scroll-behavior:smooth}
body{margin:0;background:var(--ground);color:var(--ink);font:1rem/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans",
 "Helvetica Neue",Arial,sans-serif;font-variant-numeric:tabular-nums}
header,main,footer{--gutter:clamp(1rem,4vw,2.5rem);max-width:70rem;margin:0 auto;padding:0 var(--gutter)}
header{padding-top:clamp(1.5rem,5vw,3.5rem)}
h1,h2,h3,p,ul,ol,dl,figure{margin:0}
h1{font-size:clamp(1.5rem,4.5vw,2.25rem);line-height:1.2;letter-spacing:-.015em;overflow-wrap:anywhere}
h2{font-size:1.35rem;line-height:1.3;letter-spacing:-.01em}
h3{font-size:1rem;line-height:1.4;overflow-wrap:anywhere}
a{color:var(--accent);text-underline-offset:.15em;text-decoration-thickness:.06em}
a:focus-visible,summary:focus-visible,.scroll:focus-visible{outline:2px solid var(--accent);outline-offset:2px}
bdi{overflow-wrap:anywhere}
.eyebrow{color:var(--muted);font-size:.875rem;margin-bottom:.35rem}
.eyebrow b{color:var(--ink)}
.about{color:var(--muted);margin-top:.5rem;overflow-wrap:anywhere}
.skip{position:absolute;left:-99rem}
.skip:focus{left:1rem;top:1rem;background:var(--paper);padding:.5rem 1rem;z-index:5}
.verdict{background:var(--paper);border:1px solid var(--line);border-left:5px solid var(--accent);border-radius:10px;
 padding:clamp(1rem,3vw,1.75rem) clamp(1rem,3vw,2rem);margin-top:1.75rem}
.headline{font-size:clamp(1.12rem,2.6vw,1.4rem);line-height:1.42;text-wrap:pretty}
.headline strong{white-space:nowrap}
.headline bdi,.verdict li bdi{font-weight:600}
.verdict ul{padding-left:1.15rem;margin-top:.9rem}
.verdict li{margin:.3rem 0;max-width:52rem}
.verdict h2{font-size:1rem;margin-top:1.35rem}
.verdict .advice{list-style:none;padding:0;margin-top:.15rem}
.advice li{margin:.5rem 0 0}
code{font:.86em/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;overflow-wrap:anywhere}
.command{display:block;background:var(--soft);border-radius:6px;padding:.5rem .75rem;margin-top:.3rem;user-select:all;
 -webkit-user-select:all}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,9.4rem),1fr));gap:.75rem;margin-top:1rem;
 padding:0;list-style:none}
.tiles.wide{grid-template-columns:repeat(auto-fit,minmax(min(100%,18.5rem),1fr))}
.tile{background:var(--paper);border:1px solid var(--line);border-radius:10px;padding:.8rem 1rem .9rem}
.tile h3{font-size:.875rem;font-weight:500;color:var(--muted)}
.tile h3::first-letter{text-transform:uppercase}
.tile .big{font-size:1.85rem;font-weight:650;line-height:1.2;letter-spacing:-.02em;margin-top:.1rem}
.tile .big small{font-size:1rem;font-weight:500;color:var(--muted);letter-spacing:0}
.tile .note{font-size:.8125rem;color:var(--muted)}
.tile .row{display:grid;grid-template-columns:1fr auto;column-gap:.75rem;align-items:baseline;margin-top:.4rem;
 font-size:.9375rem}
.tile .row bdi{white-space:nowrap;overflow:hidden;text-overflow:ellipsis;text-align:left}
.tile .row b{font-size:1.1rem}
.tile .row .interval{display:inline}
.mini{display:block;width:100%;height:8px;margin-top:.4rem;overflow:visible}
.row .mini{grid-column:1/-1;margin-top:.15rem}
.mini .track{fill:var(--line)}
.mini.many{color:var(--many)}.mini.medium{color:var(--medium)}.mini.few{color:var(--few)}.mini.all{color:var(--ink)}
.mini .span{fill:currentColor;opacity:.4}.mini .dot{fill:currentColor}
nav{margin-top:1.5rem;font-size:.9375rem;color:var(--muted)}
nav ul{display:flex;flex-wrap:wrap;gap:.2rem 1.1rem;list-style:none;padding:0}
nav a{text-decoration:none}
nav a:hover{text-decoration:underline}
section{margin-top:clamp(2.25rem,5vw,3.5rem);scroll-margin-top:1rem}
section>p,.say p{max-width:46rem;margin-top:.5rem;text-wrap:pretty}
.quiet{color:var(--muted);font-size:.9375rem}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,25rem),1fr));gap:1.25rem;margin-top:1.1rem;
 align-items:start}
.figures>*{min-width:0}
.figures.lone>figure{max-width:max(50% - .625rem,25rem)}
.figures>.scroll,.side>.scroll:first-child,.figures .say p:first-child{margin-top:0}
figure{background:var(--paper);border:1px solid var(--line);border-radius:10px;padding:.9rem .9rem .7rem;min-width:0;
 break-inside:avoid}
figure .title{display:flex;justify-content:space-between;gap:1rem;align-items:baseline;margin-bottom:.5rem;
 padding:0 .25rem}
figure .title a{font-size:.8125rem;color:var(--muted);flex:none}
svg.figure{display:block;width:100%;height:auto;overflow:visible}
svg.figure text{font-family:system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans","Helvetica Neue",Arial,sans-serif;
 font-variant-numeric:tabular-nums}
.side{padding-top:.2rem}
.scroll{overflow-x:auto;container-type:inline-size;margin-top:1rem;
 border:1px solid var(--line);border-radius:10px;background:var(--paper);min-width:0}
.scroll.narrow tbody th bdi{max-width:10rem}
.scroll.narrow th+th,.scroll.narrow td{padding-left:.4rem;padding-right:.4rem}
.scroll.narrow td:last-child,.scroll.narrow th:last-child{padding-right:1rem}
.scroll.tall{max-height:27rem;overflow-y:auto}
.scroll.tall thead th{position:sticky;top:0;background:var(--paper);box-shadow:0 1px var(--line)}
table{border-collapse:collapse;width:100%;font-size:.9375rem}
caption{text-align:left;padding:.75rem 1rem .5rem;font-weight:600}
caption div{position:sticky;left:1rem;width:max-content;max-width:min(100%,calc(100vw - 5rem));
 max-width:calc(100cqw - 2rem)}
caption small{display:block;font-weight:400;color:var(--muted);font-size:.8125rem}
th,td{padding:.42rem .75rem;text-align:right;white-space:nowrap;vertical-align:baseline}
th:first-child,td:first-child{text-align:left;padding-left:1rem}
th:last-child,td:last-child{padding-right:1rem}
thead th{font-weight:500;color:var(--muted);font-size:.8125rem;border-bottom:1px solid var(--line);vertical-align:bottom}
thead th bdi,tbody th bdi{display:inline-block;max-width:min(24rem,45vw);overflow:hidden;text-overflow:ellipsis;
 vertical-align:bottom}
tbody th{font-weight:500}
tbody tr+tr>*{border-top:1px solid var(--line)}
td.text,th.text{text-align:left}
.scroll.words td,.scroll.words th{text-align:left}
.interval,.sub{display:block;color:var(--muted);font-size:.8125rem;line-height:1.35}
.beside{display:inline;margin-left:.4rem}
.real{color:var(--ink);font-weight:600}
.none{color:var(--muted)}
.group{white-space:nowrap;font-size:.8125rem;color:var(--muted)}
.key{display:inline-block;width:.7em;height:.7em;margin-right:.4em;vertical-align:-.02em}
.key.many{fill:var(--many)}.key.medium{fill:var(--medium)}.key.few{fill:var(--few)}
.facts{display:grid;grid-template-columns:max-content minmax(0,1fr);gap:.3rem 1.25rem;margin-top:1rem;font-size:.9375rem}
.facts dt{color:var(--muted)}
.facts dd{margin:0;overflow-wrap:anywhere}
.pairs{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,19rem),1fr));gap:.85rem;margin-top:1rem;padding:0;
 list-style:none}
.pair{background:var(--paper);border:1px solid var(--line);border-radius:10px;padding:.8rem .9rem;break-inside:avoid;
 min-width:0}
.pair .names{display:grid;grid-template-columns:fit-content(50%) auto minmax(0,1fr);gap:.5rem;align-items:baseline;
 font-weight:600}
.pair .names bdi{overflow:hidden;text-overflow:ellipsis;white-space:nowrap;text-align:left}
.pair .arrow{color:var(--muted);font-weight:400}
.pair .note{font-size:.8125rem;color:var(--muted);margin-top:.1rem}
.thumbs{display:grid;grid-template-columns:repeat(3,minmax(0,1fr));gap:.5rem;margin-top:.6rem;max-width:17rem}
.thumbs figure{border:0;padding:0;background:none;border-radius:0}
.thumbs img,.thumbs .gone{display:block;width:100%;aspect-ratio:1;border-radius:6px;background:var(--soft);object-fit:cover}
.thumbs img.small{image-rendering:pixelated}
.thumbs .gone{display:grid;place-items:center;color:var(--muted);font-size:.75rem;text-align:center;padding:.25rem}
.thumbs figcaption{font-size:.75rem;color:var(--muted);text-align:center;margin-top:.15rem}
h3.above{margin-top:1.75rem}
details{margin-top:1rem}
summary{cursor:pointer;color:var(--accent);font-weight:500;padding:.2rem 0;overflow-wrap:anywhere}
.tag{font-size:.75rem;color:var(--muted);margin-left:.4rem}
.tip{position:fixed;z-index:9;pointer-events:none;background:var(--ink);color:var(--paper);font-size:.8125rem;line-height:1.4;
 padding:.3rem .6rem;border-radius:6px;max-width:min(20rem,80vw);overflow-wrap:anywhere}
.ring{fill:none;stroke:var(--ink);stroke-width:1.4}
footer{margin-top:3.5rem;padding-bottom:3rem;color:var(--muted);font-size:.875rem}
footer p{border-top:1px solid var(--line);padding-top:1rem}
@media (max-width:40rem){
 .facts{grid-template-columns:minmax(0,1fr);gap:0}.facts dd{margin-bottom:.5rem}
 figure{padding:.7rem .35rem .5rem}
 .figures>figure,.figures.lone>figure{margin:0 calc(-1*var(--gutter));max-width:none;border-width:1px 0;border-radius:0;
  padding:.7rem 0 .5rem}
 .figures>figure>.title{padding:0 var(--gutter)}
 th,td{padding-left:.5rem;padding-right:.5rem}
 thead th bdi,tbody th bdi{max-width:32vw}
}
@media print{
 @page{margin:14mm}
 html{font-size:9.5pt}
 body{background:none}
 header,main,footer{max-width:none;padding:0}
 nav,.skip,.tip,figure .title a{display:none}
 summary{display:block;list-style:none;color:inherit;font-weight:600}
 summary::-webkit-details-marker{display:none}
 .tiles.wide{grid-template-columns:repeat(3,minmax(0,1fr))}
 details::details-content{content-visibility:visible;display:block;height:auto}
 .scroll,.scroll.tall{overflow:visible;max-height:none;border:0;border-radius:0;border-top:1px solid var(--line)}
 .scroll.tall thead th{position:static}
 .figures{grid-template-columns:repeat(2,minmax(0,1fr))}
 .figures.lone>figure{max-width:none}
 .pairs{grid-template-columns:repeat(3,minmax(0,1fr))}
 th,td{padding:.2rem .4rem}
 .figures th bdi{max-width:7rem}
 .scroll.words td{white-space:normal}
 table{font-size:.88rem}
 caption div{position:static;width:auto;max-width:none}
 tr,p,.tile,.verdict,.pair{break-inside:avoid}
 h2,h3,caption,section>p{break-after:avoid}
 section{margin-top:1.75rem}
 a{color:inherit;text-decoration:none}
}
"""

# Names of points where the pointer is, and folded parts opened for print. Without it the points still have their titles.
SCRIPT = """
"use strict";
(() => {
  const tip = document.createElement("div");
  tip.className = "tip"; tip.hidden = true; tip.setAttribute("aria-hidden", "true");
  document.body.append(tip);
  for (const svg of document.querySelectorAll("svg.figure")) {
    const points = [...svg.querySelectorAll("use > title")].map(title => {
      const use = title.parentNode, point = {x: +use.getAttribute("x"), y: +use.getAttribute("y"), text: title.textContent};
      title.remove(); use.setAttribute("data-name", point.text);
      return point;
    });
    if (!points.length) continue;
    const ring = document.createElementNS("http://www.w3.org/2000/svg", "circle");
    ring.setAttribute("class", "ring"); ring.setAttribute("r", "5.5"); ring.setAttribute("visibility", "hidden");
    svg.append(ring);
    const hide = () => { tip.hidden = true; ring.setAttribute("visibility", "hidden"); };
    const show = event => {
      const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
      let nearest = null, least = 144;
      for (const point of points) {
        const far = (point.x - at.x) ** 2 + (point.y - at.y) ** 2;
        if (far < least) { least = far; nearest = point; }
      }
      if (!nearest) return hide();
      ring.setAttribute("cx", nearest.x); ring.setAttribute("cy", nearest.y); ring.setAttribute("visibility", "visible");
      tip.textContent = nearest.text; tip.hidden = false;
      const box = tip.getBoundingClientRect();
      tip.style.left = Math.max(4, Math.min(event.clientX + 12, innerWidth - box.width - 4)) + "px";
      tip.style.top = Math.max(4, event.clientY - box.height - 12) + "px";
    };
    svg.addEventListener("pointermove", show);
    svg.addEventListener("pointerdown", show);
    svg.addEventListener("pointerleave", hide);
  }
  addEventListener("beforeprint", () => {
    for (const part of document.querySelectorAll("details:not([open])")) { part.open = true; part.dataset.folded = ""; }
  });
  addEventListener("afterprint", () => {
    for (const part of document.querySelectorAll("details[data-folded]")) { part.open = false; delete part.dataset.folded; }
  });
})();
"""


def sheet(figures: str) -> str:
    """The whole style sheet. ``figures``: the classes of the SVGs. Dark is for screens: paper is white."""
    return (f":root{{color-scheme:light dark;{_variables(LIGHT)}}}"
            f"@media screen and (prefers-color-scheme:dark){{:root{{{_variables(DARK)}}}}}{_SHEET}{figures}")  # fmt: skip
