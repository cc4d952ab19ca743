// A clip is one film with its versions below each other, so that they are always in step. Each version, and its
// magnified detail, is drawn on a canvas above the picture that is shown without scripts.
const films = [...document.querySelectorAll("video")].map(video => {
  const clip = video.closest(".clip");
  return { video, box: clip.dataset.box.split(" ").map(Number), tiles: [...clip.querySelectorAll("figure")], seen: false };
});
let playing = !matchMedia("(prefers-reduced-motion: reduce)").matches;
const update = () => films.forEach(film => playing && film.seen ? film.video.play().catch(() => {}) : film.video.pause());

const cut = (canvas, video, x, y, width, height) => {
  if (canvas.hidden) Object.assign(canvas, { hidden: false, width: Math.round(width), height: Math.round(height) });
  canvas.getContext("2d").drawImage(video, x, y, width, height, 0, 0, canvas.width, canvas.height);
};
const draw = () => {
  for (const { video, box: [top, left, height, width], tiles, seen } of films) {
    if (!seen || !video.currentTime) continue;
    const w = video.videoWidth, h = video.videoHeight / tiles.length;
    tiles.forEach((tile, number) => {
      const [whole, detail] = tile.querySelectorAll("canvas");
      cut(whole, video, 0, number * h, w, h);
      cut(detail, video, left * w, (number + top) * h, width * w, height * h);
    });
  }
  requestAnimationFrame(draw);
};
draw();

const sight = new IntersectionObserver(entries => {
  entries.forEach(entry => { films.find(film => film.tiles[0] === entry.target).seen = entry.isIntersecting; });
  update();
});
films.forEach(film => sight.observe(film.tiles[0]));
const pause = document.querySelector("#pause");
const label = () => { pause.textContent = playing ? "Pause" : "Play"; };
pause.addEventListener("click", () => { playing = !playing; label(); update(); });
label();
const speeds = [...document.querySelectorAll("[data-speed]")];
speeds.forEach(button => button.addEventListener("click", () => {
  speeds.forEach(other => other.setAttribute("aria-pressed", String(other === button)));
  films.forEach(film => { film.video.playbackRate = Number(button.dataset.speed); });
}));
