// Pieces of text with a tint each. Vue writes {{ }} as text, never as markup.
export default {
  template: `<div class="pt-tokens"><span v-for="(piece, place) in pieces" :key="place" :class="{ 'pt-given': piece[3] }"
    :style="piece[1] ? { backgroundColor: piece[1] } : null" :title="piece[2]">{{ piece[0] }}</span></div>`,
  props: { pieces: Array },
};
