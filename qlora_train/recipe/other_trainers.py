"""Settings of other trainers, and what is written here for the same, for errors about unknown keys.

From Hugging Face's TrainingArguments and BitsAndBytesConfig, PEFT, TRL, Axolotl, LLaMA-Factory, Unsloth and
torchtune. What has the same name in a recipe is not listed. `name=value` is about one value of a setting, and
`{value}` in an answer is the value that was written.
"""

from __future__ import annotations

from typing import Any

from qlora_train.recipe.yaml_file import show

_OURS = {
    "model.base": "base_model model_name model_name_or_path pretrained_model_name_or_path model_id "
    "checkpoint_dir",
    "model.revision": "model_revision base_model_revision",
    "model.quantization": "bnb_4bit_quant_type quant_type quantization_bit quantization_type",
    "model.quantization: nf4": "load_in_4bit=true quantization_bit=4 quantize_base=true",
    "model.quantization: int8": "load_in_8bit=true quantization_bit=8",
    "model.quantization: none (a base in 16 bits, unless load_in_8bit is true)": "load_in_4bit=false "
    "load_in_16bit=true adapter=lora",
    "model.double_quant": "bnb_4bit_use_double_quant double_quantization use_double_quant",
    "model.compute_dtype": "bnb_4bit_compute_dtype torch_dtype dtype precision mixed_precision",
    "model.compute_dtype: bfloat16": "bf16=true bf16=full pure_bf16=true bfloat16=true dtype=bf16 "
    "precision=bf16 mixed_precision=bf16",
    "model.compute_dtype: float16": "fp16=true float16=true dtype=fp16 precision=fp16 mixed_precision=fp16",
    "model.chat_template": "template chat_template_path custom_chat_template chat_template_jinja",
    "model.add_tokens": "tokens new_special_tokens additional_special_tokens",
    "lora.rank": "r lora_r lora_rank",
    "lora.alpha": "lora_alpha",
    "lora.dropout": "lora_dropout",
    "lora.target_modules": "lora_target lora_target_modules lora_attn_modules apply_lora_to_mlp "
    "apply_lora_to_output",
    "lora.target_modules: all-linear": "lora_target_linear=true lora_target=all",
    "lora.layers_to_transform": "peft_layers_to_transform lora_layers",
    "lora.use_rslora: true": "peft_use_rslora=true rslora=true",
    "lora.use_dora: true": "peft_use_dora=true dora=true",
    "lora.init_lora_weights": "peft_init_lora_weights",
    "lora.init_lora_weights: pissa": "pissa_init=true",
    "lora.init_lora_weights (such as pissa_niter_{value})": "pissa_iter",
    "lora.init_from": "adapter_name_or_path lora_model_dir peft_model_id",
    "data.train": "dataset datasets dataset_name dataset_path dataset_dir train_file train_dataset data_path "
    "pretraining_dataset data_files",
    "data.train (with a weight for each source)": "mix_strategy interleave_probs",
    "data.format": "type dataset_type",
    "data.train (with a weight, the share of its rows: [{path: ..., weight: {value} / rows}])": ""
    "max_samples max_train_samples",
    "data.eval": "eval_dataset test_datasets validation_file validation_split dataset_val",
    "data.eval (a share of the rows, such as 0.1)": "val_set_size val_size",
    "data.columns": "text_column column_map field_messages formatting",
    "data.columns (such as {text: {value}})": "dataset_text_field",
    "data.sequence_length": "max_seq_length max_seq_len max_length sequence_len cutoff_len model_max_length "
    "block_size source_max_len",
    "data.chat_template_kwargs (such as {enable_thinking: {value}})": "enable_thinking",
    "data.packing": "sample_packing packed neat_packing padding_free",
    "data.supervise": "roles_to_train",
    "data.supervise: completions (the default)": "train_on_inputs=false train_on_input=false "
    "train_on_prompt=false completion_only_loss=true assistant_only_loss=true train_on_responses_only=true",
    "data.supervise: all": "train_on_inputs=true train_on_input=true train_on_prompt=true "
    "completion_only_loss=false assistant_only_loss=false train_on_responses_only=false",
    "data.supervise: last_turn": "mask_history=true",
    "data.too_long": "excess_length_strategy truncation_mode truncation_side",
    "training.output_dir": "output save_dir",
    "training.seed": "random_state data_seed",
    "training.epochs": "num_train_epochs num_epochs n_epochs",
    "training.max_steps": "max_iters num_steps iters total_steps max_steps_per_epoch",
    "training.batch_size": "global_batch_size effective_batch_size total_batch_size",
    "training.micro_batch_size": "per_device_train_batch_size per_gpu_train_batch_size",
    "training.gradient_accumulation_steps": "grad_accumulation_steps accumulate_grad_batches",
    "training.learning_rate": "lr",
    "training.lora_b_lr_ratio": "loraplus_lr_ratio",
    "training.lr_schedule": "lr_scheduler lr_scheduler_type scheduler",
    "training.warmup_ratio (a share: {value} / steps of the run)": "warmup_steps num_warmup_steps",
    "training.optimizer": "optim",
    "training.optimizer: adamw": "optim=adamw_torch optim=adamw_torch_fused optim=adamw_hf",
    "training.optimizer: adamw_8bit": "optim=adamw_bnb_8bit",
    "training.max_grad_norm": "clip_grad_norm gradient_clipping gradient_clip_val grad_clip",
    "training.kernels: reference": "attn_implementation=eager flash_attn=disabled",
    "training.deterministic: true": "full_determinism=true",
    "training.log_every": "logging_steps log_every_n_steps",
    "training.eval_every": "eval_steps run_val_every_n_steps",
    "training.eval_every (in steps: steps of an epoch / {value})": "evals_per_epoch",
    "training.eval_every (in steps: the steps of an epoch)": "eval_strategy=epoch evaluation_strategy=epoch",
    "training.early_stopping (such as {patience: {value}})": "early_stopping_patience",
    "training.early_stopping (such as {patience: 3, min_delta: {value}})": "early_stopping_threshold",
    "training.save_every": "save_steps",
    "training.save_every (in steps: steps of an epoch / {value})": "saves_per_epoch",
    "training.save_every (in steps: the steps of an epoch)": "save_strategy=epoch",
    "training.save_every: null": "save_strategy=no",
    "training.keep_checkpoints": "save_total_limit",
    "training.report_to": "wandb log_with metric_logger",
    "training.report_to: [wandb]": "use_wandb=true",
    "training.report_to: [tensorboard]": "use_tensorboard=true",
    "training.report_to: [mlflow]": "use_mlflow=true",
    "training.report_to: [wandb] (and WANDB_PROJECT={value} in the environment)": "wandb_project",
    "training.report_to: [wandb] (and WANDB_ENTITY={value} in the environment)": "wandb_entity",
    "training.report_to: [wandb] (and WANDB_NAME={value} in the environment)": "wandb_name wandb_run_name",
    "memory.vram": "gpu_memory_limit max_memory gpu_memory_utilization",
    "memory.weights": "cpu_offload offload_folder fsdp_offload_params",
    "memory.activations: recompute (auto, the default, does so where it must)": "gradient_checkpointing=true "
    "use_gradient_checkpointing=true activation_checkpointing=true enable_activation_checkpointing=true",
    "memory.activations: offload (auto, the default, does so where it must)": "activation_offloading=true "
    "enable_activation_offloading=true gradient_checkpointing=unsloth gradient_checkpointing=offload "
    "use_gradient_checkpointing=unsloth",
}
"""What is written here, with `: value` where the setting implies one and a note in brackets -> settings."""
_NOT_NEEDED = "not needed here: leave it out"
_ABSENT = "there is no such setting here: leave it out"
_LEFT_OUT = {
    _NOT_NEEDED: "strict overwrite_cache preprocessing_num_workers dataset_num_proc dataset_processes "
    "ddp_timeout plot_loss do_train do_eval do_predict overwrite_output_dir tf32 remove_unused_columns "
    "logging_first_step logging_strategy logging_dir dataloader_num_workers dataloader_pin_memory "
    "dataset_prepared_path disable_tqdm is_llama_derived_model low_cpu_mem_usage "
    "gradient_checkpointing_kwargs ddp_find_unused_parameters run_name save_safetensors save_only_model "
    "eval_strategy evaluation_strategy save_strategy use_cache task_type debug fan_in_fan_out "
    "inference_mode lora_fan_in_fan_out local_rank use_fast_tokenizer use_fast bias=none group_by_length "
    "pad_to_sequence_len streaming buffer_size preprocessing_batch_size bf16_full_eval fp16_full_eval "
    "dataloader_prefetch_factor dataloader_persistent_workers dataloader_drop_last quantization_method "
    "ds_type max_lora_rank lora_on_cpu skip_prepare_dataset disable_gradient_checkpointing "
    "val_set_size=0 val_set_size=0.0 val_size=0 val_size=0.0",
    f"{_NOT_NEEDED} (every run trains LoRA)": "adapter peft_type use_peft use_lora",
    f"{_NOT_NEEDED} (every run trains LoRA; without quantization_bit, set model.quantization: none)": ""
    "finetuning_type=lora",
    f"{_NOT_NEEDED} (every run is supervised, and trains LoRA)": "stage=sft full_finetuning=false",
    f"{_NOT_NEEDED} (the base says it)": "model_type tokenizer_type tokenizer_name_or_path tokenizer_name "
    "tokenizer_config special_tokens pad_token padding_side eos_token tokenizer tokenizer_use_fast "
    "fix_tokenizer base_model_config rope_scaling",
    f"{_NOT_NEEDED} (the chat template says it)": "instruction_part response_part message_property_mappings "
    "message_field_role message_field_content tool_format",
    f"{_NOT_NEEDED} (model.add_tokens does it)": "resize_model_vocab resize_vocab "
    "resize_token_embeddings_to_32x",
    f"{_NOT_NEEDED} (training.seed shuffles the rows)": "shuffle shuffle_dataset",
    f"{_NOT_NEEDED} (rows are packed best-fit)": "packing_strategy sample_packing_eff_est "
    "sample_packing_bin_size pad_to_multiple_of",
    f"{_NOT_NEEDED} (training.micro_batch_size: auto finds it)": "auto_find_batch_size",
    f"{_NOT_NEEDED} (training.micro_batch_size is for evaluation, too)": "per_device_eval_batch_size "
    "per_gpu_eval_batch_size eval_batch_size",
    f"{_NOT_NEEDED} (data.packing is for evaluation, too)": "eval_sample_packing eval_packing",
    f"{_NOT_NEEDED} (data.sequence_length is for evaluation, too)": "eval_sequence_len",
    f"{_NOT_NEEDED} (memory.weights: auto finds it)": "device_map device",
    f"{_NOT_NEEDED} (training.kernels: auto takes the fastest)": "attn_implementation flash_attention "
    "flash_attn use_flash_attention_2 xformers_attention sdp_attention use_liger_kernel enable_liger_kernel "
    "liger_rope liger_rms_norm liger_glu_activation liger_kernel_config lora_mlp_kernel lora_qkv_kernel "
    "lora_o_kernel cut_cross_entropy use_unsloth use_unsloth_gc unsloth_tiled_mlp torch_compile compile",
    f"{_NOT_NEEDED} (the best checkpoint is kept)": "load_best_model_at_end metric_for_best_model "
    "greater_is_better",
    "leave it out: qlora-train export --push-to-hub does it": "push_to_hub hub_model_id hub_strategy",
    "leave it out: hf auth login keeps it": "token hub_token",
    "leave it out: qlora-train train RUN --resume does it": "resume_from_checkpoint "
    "auto_resume_from_checkpoints",
    "leave it out: qlora-train export does it": "export_dir export_size export_device "
    "export_quantization_bit",
    "leave it out: qlora-train eval does it": "compute_accuracy predict_with_generate eval_table_size "
    "eval_max_new_tokens",
    f"{_ABSENT} (a column or a message of the rows is the system prompt)": "default_system",
    _ABSENT: "neftune_noise_alpha loftq_config modules_to_save lora_modules_to_save additional_target "
    "label_smoothing_factor use_galore adam_beta1 adam_beta2 "
    "adam_epsilon train_on_eot train_on_eos shuffle_merged_datasets trust_remote_code deepspeed fsdp "
    "fsdp_config use_cpu no_cuda lr_scheduler_kwargs cosine_min_lr_ratio optim_args "
    "optim_target_modules use_badam use_apollo use_adam_mini use_muon loraplus_lr_embedding embedding_lr "
    "moe_aux_loss_coef unfrozen_parameters freeze_trainable_layers plugins",
    f"{_ABSENT} (every run is supervised, and trains LoRA)": "stage finetuning_type full_finetuning rl",
    f"{_ABSENT} (lora.lora_bias trains a bias of B)": "bias",
}

ANSWERS: dict[str, str] = {
    name: f"here it is {ours}" for ours, names in _OURS.items() for name in names.split()
}
ANSWERS |= {name: answer for answer, names in _LEFT_OUT.items() for name in names.split()}
"""`setting` or `setting=value` of another trainer -> what to write here."""
_SETTINGS = {name.partition("=")[0] for name in ANSWERS}


def answer_to(setting: str, value: Any) -> str:
    """`; here it is section.key`, or another answer to a setting of another trainer; nothing if it is none.
    null, and a value that is not listed where only values are, stand for the defaults."""
    if setting not in _SETTINGS:
        return ""
    text = show(value).strip("'")
    of_value, of_any = ANSWERS.get(f"{setting}={text.lower()}"), ANSWERS.get(setting)
    if of_value is None and (of_any is None or value is None):
        return f"; {_NOT_NEEDED}"
    return f"; {of_value or of_any}".replace("{value}", text)
