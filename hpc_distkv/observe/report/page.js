const holder = document.getElementById("debts");
if (holder) {
  const { frames, end, left, right, most } = JSON.parse(holder.textContent);
  const slider = document.getElementById("moment");
  const now = document.getElementById("now");
  const clock = (s) => s < 60 ? `${s.toFixed(1)} s`
    : [s / 3600, s / 60 % 60, s % 60].map((n) => String(Math.floor(n)).padStart(2, "0")).join(":");
  let filled = [];
  const show = () => {
    const { at, debts } = frames.findLast(({ at }) => at <= Number(slider.value)) ?? frames[0];
    for (const name of filled) {
      document.getElementById(`c${name}`)?.setAttribute("fill-opacity", 0);
      document.getElementById(`t${name}`)?.replaceChildren();
    }
    filled = debts.map(([debtor, creditor]) => `${debtor}-${creditor}`);
    let total = 0;
    for (const [debtor, creditor, blocks] of debts) {
      const name = `${debtor}-${creditor}`;
      total += blocks;
      const opacity = 0.25 + 0.75 * blocks / most;
      document.getElementById(`c${name}`)?.setAttribute("fill-opacity", opacity);
      const value = document.getElementById(`t${name}`);
      value?.append(blocks);
      value?.classList.toggle("strong", opacity > 0.5);
    }
    const x = left + (right - left) * at / end;
    now.setAttribute("x1", x);
    now.setAttribute("x2", x);
    document.getElementById("caption").textContent =
      `After ${clock(at)}: ${total} rBlocks between ${debts.length} ${debts.length === 1 ? "pair" : "pairs"}`;
  };
  slider.addEventListener("input", show);
  show();
}
