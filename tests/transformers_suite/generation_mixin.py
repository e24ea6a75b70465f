"""What Transformers asks of every model that generates: each decoding mode, each way into the cache."""

import copy

import torch
from transformers import DynamicCache, set_seed
from transformers.generation import GenerateBeamDecoderOnlyOutput, GenerateDecoderOnlyOutput, GenerationMixin
from transformers.testing_utils import torch_device

NEW = 5


class GenerationTesterMixin:
    """Tests of `generate`. The host class has `model_tester` and `all_generative_model_classes`."""

    def _models(self):
        for model_class in self.all_generative_model_classes:
            set_seed(42)
            config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
            yield model_class(copy.deepcopy(config)).to(torch_device).eval(), inputs["input_ids"][:2, :6]

    @staticmethod
    def _generate(model, input_ids=None, **options):
        """Greedy unless told otherwise, never ended early, so that lengths are known."""
        options = {"do_sample": False, "max_new_tokens": NEW, "min_new_tokens": NEW, "pad_token_id": 0} | options
        return model.generate(input_ids, **options)

    def test_generation_mixin_is_inherited(self):
        for model_class in self.all_generative_model_classes:
            self.assertTrue(issubclass(model_class, GenerationMixin))

    def test_greedy_equals_taking_the_largest_logit_without_a_cache(self):
        for model, ids in self._models():
            expected = ids
            for _ in range(NEW):
                with torch.no_grad():
                    logits = model(expected, use_cache=False).logits[:, -1]
                # min_new_tokens forbids the end token.
                logits[:, model.generation_config.eos_token_id] = -torch.inf
                expected = torch.cat([expected, logits.argmax(-1, keepdim=True)], dim=1)
            torch.testing.assert_close(self._generate(model, ids), expected)
            torch.testing.assert_close(self._generate(model, ids, use_cache=False), expected)

    def test_greedy_dict_outputs(self):
        for model, ids in self._models():
            out = self._generate(
                model,
                ids,
                return_dict_in_generate=True,
                output_scores=True,
                output_logits=True,
                output_hidden_states=True,
            )
            self.assertIsInstance(out, GenerateDecoderOnlyOutput)
            self.assertEqual((len(out.scores), len(out.logits), len(out.hidden_states)), (NEW, NEW, NEW))
            self.assertEqual(out.hidden_states[0][0].shape[1], ids.shape[1])
            self.assertEqual(out.hidden_states[1][0].shape[1], 1)
            self.assertEqual(out.past_key_values.get_seq_length(), ids.shape[1] + NEW - 1)

    def test_sampling_with_a_seed_does_not_depend_on_the_cache(self):
        for model, ids in self._models():
            samples = []
            for use_cache in (True, False):
                set_seed(7)
                samples.append(self._generate(model, ids, do_sample=True, use_cache=use_cache, num_return_sequences=2))
            self.assertEqual(samples[0].shape, (2 * len(ids), ids.shape[1] + NEW))
            torch.testing.assert_close(*samples)

    def test_beam_search_does_not_depend_on_the_cache(self):
        for model, ids in self._models():
            options = {
                "num_beams": 3,
                "num_return_sequences": 2,
                "return_dict_in_generate": True,
                "output_scores": True,
            }
            cached = self._generate(model, ids, **options)
            plain = self._generate(model, ids, **options, use_cache=False)
            self.assertIsInstance(cached, GenerateBeamDecoderOnlyOutput)
            torch.testing.assert_close(cached.sequences, plain.sequences)
            torch.testing.assert_close(cached.sequences_scores, plain.sequences_scores, rtol=1e-4, atol=1e-5)

    def test_beam_sampling_runs(self):
        for model, ids in self._models():
            out = self._generate(model, ids, do_sample=True, num_beams=2)
            self.assertEqual(out.shape, (len(ids), ids.shape[1] + NEW))

    def test_left_padding_changes_no_token(self):
        for model, ids in self._models():
            padded = torch.nn.functional.pad(ids, (3, 0), value=0)
            mask = torch.nn.functional.pad(torch.ones_like(ids), (3, 0), value=0)
            out = self._generate(model, padded, attention_mask=mask)
            torch.testing.assert_close(out[:, 3:], self._generate(model, ids))

    def test_rows_do_not_depend_on_their_batch(self):
        for model, ids in self._models():
            together = self._generate(model, ids)
            alone = torch.cat([self._generate(model, row[None]) for row in ids])
            torch.testing.assert_close(together, alone)

    def test_generation_continues_from_returned_past_key_values(self):
        for model, ids in self._models():
            first = self._generate(model, ids, max_new_tokens=2, min_new_tokens=2, return_dict_in_generate=True)
            rest = self._generate(
                model, first.sequences, past_key_values=first.past_key_values, max_new_tokens=3, min_new_tokens=3
            )
            torch.testing.assert_close(rest, self._generate(model, ids))

    def test_generation_from_a_prefilled_cache(self):
        for model, ids in self._models():
            cache = DynamicCache(config=model.config)
            with torch.no_grad():
                model(ids[:, :4], past_key_values=cache, use_cache=True)
            torch.testing.assert_close(self._generate(model, ids, past_key_values=cache), self._generate(model, ids))

    def test_generation_from_inputs_embeds(self):
        for model, ids in self._models():
            embeds = model.get_input_embeddings()(ids).detach()
            expected = self._generate(model, ids)
            torch.testing.assert_close(self._generate(model, inputs_embeds=embeds), expected[:, ids.shape[1] :])
            torch.testing.assert_close(self._generate(model, ids, inputs_embeds=embeds), expected)

    def test_prefill_in_pieces_gives_the_same_tokens(self):
        for model, ids in self._models():
            torch.testing.assert_close(self._generate(model, ids, prefill_chunk_size=4), self._generate(model, ids))

    def test_logits_to_keep_matches_the_full_logits(self):
        for model, ids in self._models():
            with torch.no_grad():
                full = model(ids).logits
                torch.testing.assert_close(model(ids, logits_to_keep=1).logits, full[:, -1:])
                torch.testing.assert_close(
                    model(ids, logits_to_keep=torch.tensor([0, 3], device=ids.device)).logits, full[:, [0, 3]]
                )

    def test_a_static_cache_gives_the_same_tokens(self):
        for model, ids in self._models():
            static = self._generate(model, ids, cache_implementation="static", disable_compile=True)
            torch.testing.assert_close(static, self._generate(model, ids))

    def test_position_ids_change_nothing(self):
        for model, ids in self._models():
            positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
            with torch.no_grad():
                torch.testing.assert_close(model(ids, position_ids=positions).logits, model(ids).logits)

    def test_modes_that_take_tokens_back_are_refused(self):
        for model, ids in self._models():
            with self.assertRaisesRegex(ValueError, "stateful"):
                self._generate(model, ids[:1], prompt_lookup_num_tokens=2)
            with self.assertRaisesRegex(ValueError, "stateful"):
                self._generate(model, ids[:1], assistant_model=copy.deepcopy(model))
