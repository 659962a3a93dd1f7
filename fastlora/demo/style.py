"""The report's stylesheet and its few lines of script."""

CSS = """
:root{color-scheme:light dark;
--page:#f8f6f3;--card:#fff;--ink:#1d1b19;--muted:#6f6a64;--line:#e4dfd8;--accent:#d9480f;
--good:#2b8a3e;--bar:#c9c2b8;--code:#f3efe9}
@media(prefers-color-scheme:dark){:root{
--page:#131211;--card:#1c1b19;--ink:#efece8;--muted:#a29b92;--line:#35322e;--accent:#ff7a45;
--good:#69db7c;--bar:#57524b;--code:#151412}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);line-height:1.55;font-size:16px;
font-family:Inter,system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",sans-serif;
-webkit-font-smoothing:antialiased}
main{max-width:1080px;margin:0 auto;padding:56px 24px 72px}
header{margin-bottom:36px}
.brand{font-weight:650;letter-spacing:-.01em;font-size:15px;color:var(--accent)}
h1{font-size:clamp(30px,4.6vw,46px);line-height:1.12;letter-spacing:-.025em;font-weight:700;
margin:10px 0 14px;max-width:20em;text-wrap:balance}
h2{font-size:24px;letter-spacing:-.015em;font-weight:680;margin:60px 0 8px}
h3{font-size:15px;font-weight:650;margin:0}
p{margin:0 0 14px;max-width:68ch}
.lead{font-size:18px;color:var(--muted)}
.note{color:var(--muted);font-size:14px}
b,strong{font-weight:650}
.card{background:var(--card);border:1px solid var(--line);border-radius:16px;padding:22px 24px;
margin:18px 0}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(190px,1fr));gap:14px;
margin:28px 0 0}
.figure{background:var(--card);border:1px solid var(--line);border-radius:14px;padding:16px 18px}
.figure b{display:block;font-size:27px;letter-spacing:-.02em;font-variant-numeric:tabular-nums;
line-height:1.25}
.figure span{color:var(--muted);font-size:14px}
.tile{aspect-ratio:1;border-radius:9px;background-color:#000;background-repeat:no-repeat;
filter:invert(1);min-width:0}
@media(prefers-color-scheme:dark){.tile{filter:none}}
.slider{display:grid;gap:18px}
.tiles{display:grid;grid-template-columns:repeat(10,1fr);gap:7px}
.control{display:flex;align-items:center;gap:16px}
.control output{font-weight:650;font-size:20px;width:3.2em;text-align:right;
font-variant-numeric:tabular-nums}
.control input{flex:1;accent-color:var(--accent);height:28px;margin:0}
.strip{display:grid;gap:7px 0;align-items:center}
.strip .tile{margin:0 3.5px}
.strip span{color:var(--muted);font-size:14px;text-align:right;padding-right:14px}
.strip.under span{text-align:center;padding:6px 0 0;font-variant-numeric:tabular-nums}
.chart svg,.card>svg{display:block;width:100%;height:auto;overflow:visible}
.chart{margin-top:14px}
.used{margin-bottom:18px}.used svg{display:block;width:100%;height:auto}
.rows{display:grid;grid-template-columns:auto 1fr;gap:10px 18px;align-items:center}
.rows .tiles{grid-template-columns:repeat(12,1fr)}
.rows .name{font-size:14px;color:var(--muted);text-align:right;max-width:9.5em}
.rows .name b{color:var(--ink);display:block}
table{border-collapse:collapse;width:100%;font-size:14.5px;font-variant-numeric:tabular-nums}
th{color:var(--muted);font-weight:500;text-align:right;padding:7px 10px;vertical-align:bottom}
td{text-align:right;padding:7px 10px;border-top:1px solid var(--line)}
th:first-child,td:first-child{text-align:left;padding-left:0}
th:last-child,td:last-child{padding-right:0}
.ours td{font-weight:650}
.ok{color:var(--good);font-weight:650}.bad{color:var(--accent);font-weight:650}
.scroll{overflow-x:auto}
.long{max-height:420px;overflow:auto;margin-top:12px}
.long td,.long th{font-size:12.5px;padding:3px 8px}
.long td:first-child,pre,code{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
summary{cursor:pointer;color:var(--accent);font-size:14.5px;font-weight:600;margin-top:14px}
.speed{display:grid;grid-template-columns:repeat(auto-fit,minmax(440px,1fr));gap:16px;margin:18px 0}
.speed .card{margin:0}
.speed .note{margin:2px 0 12px}
pre{background:var(--code);border-radius:12px;padding:18px 20px;overflow-x:auto;font-size:13.5px;
line-height:1.6;margin:0}
dl{display:grid;grid-template-columns:max-content 1fr;gap:5px 22px;margin:0;font-size:14.5px}
dt{color:var(--muted)}dd{margin:0;overflow-wrap:anywhere}
.two{display:grid;grid-template-columns:repeat(auto-fit,minmax(400px,1fr));gap:16px}
.two .card{margin:0}.two h3{margin-bottom:12px}
.aside{display:grid;grid-template-columns:minmax(0,1fr) minmax(0,1fr);gap:28px;align-items:center}
.aside .card{margin:0}.aside .rows .tiles{grid-template-columns:repeat(6,1fr)}
.files{margin:16px 0 0;font-size:13px;color:var(--muted)}
.files code{display:inline-block;background:var(--code);border-radius:6px;padding:1px 7px;
margin:3px 2px 0 0}
a{color:var(--accent)}
footer{color:var(--muted);font-size:13.5px;margin-top:48px}
@media(max-width:640px){main{padding:32px 16px}.card{padding:16px}
.tiles{grid-template-columns:repeat(5,1fr)}.rows .tiles{grid-template-columns:repeat(6,1fr)}
.speed,.two,.aside{grid-template-columns:1fr}.strip span{font-size:11px;padding-right:6px}}
"""

# One custom property moves all pictures: their sheet has a column for every strength.
SCRIPT = """
const range=document.querySelector('#strength'),out=document.querySelector('#shown'),
tiles=document.querySelector('#live'),names=JSON.parse(range.dataset.names);
range.addEventListener('input',()=>{tiles.style.setProperty('--c',range.value);
out.textContent=names[range.value]});
"""
