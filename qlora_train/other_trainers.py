"""Settings of other trainers, and the recipe's key for the same, for errors about unknown keys.

From Hugging Face's TrainingArguments and BitsAndBytesConfig, PEFT, TRL, Axolotl, LLaMA-Factory, Unsloth and
torchtune. What has no counterpart, and what has the same name in a recipe, is not listed.
"""

from __future__ import annotations

_OURS = {
    "model.base": "base_model model_name model_name_or_path pretrained_model_name_or_path model_id",
    "model.revision": "model_revision base_model_revision",
    "model.quantization": "adapter bnb_4bit_quant_type quant_type quantization_bit quantize_base",
    "model.quantization: nf4": "load_in_4bit",
    "model.quantization: int8": "load_in_8bit",
    "model.double_quant": "bnb_4bit_use_double_quant double_quantization use_double_quant",
    "model.compute_dtype": "bnb_4bit_compute_dtype torch_dtype dtype precision mixed_precision",
    "model.compute_dtype: bfloat16": "bf16 pure_bf16",
    "model.compute_dtype: float16": "fp16",
    "model.chat_template": "template chat_template_path custom_chat_template chat_template_jinja",
    "lora.rank": "r lora_r lora_rank",
    "lora.alpha": "lora_alpha",
    "lora.dropout": "lora_dropout",
    "lora.target_modules": "lora_target lora_target_modules lora_attn_modules apply_lora_to_mlp",
    "lora.target_modules: all-linear": "lora_target_linear",
    "lora.layers_to_transform": "peft_layers_to_transform lora_layers",
    "lora.use_rslora": "peft_use_rslora rslora",
    "lora.use_dora": "peft_use_dora dora",
    "lora.init_from": "adapter_name_or_path lora_model_dir peft_model_id",
    "data.train": "dataset datasets dataset_name dataset_path dataset_dir train_file train_dataset data_path",
    "data.eval": "val_set_size eval_dataset test_datasets validation_file validation_split val_size",
    "data.columns": "dataset_text_field text_column column_map field_messages formatting",
    "data.sequence_length": "max_seq_length max_seq_len max_length sequence_len cutoff_len model_max_length "
    "block_size source_max_len",
    "data.packing": "sample_packing group_by_length packed neat_packing padding_free",
    "data.supervise": "train_on_inputs train_on_input train_on_prompt roles_to_train completion_only_loss "
    "assistant_only_loss train_on_responses_only mask_history",
    "data.too_long": "excess_length_strategy truncation_mode truncation_side",
    "training.output_dir": "output save_dir",
    "training.seed": "random_state data_seed",
    "training.epochs": "num_train_epochs num_epochs n_epochs",
    "training.max_steps": "max_iters num_steps iters total_steps",
    "training.batch_size": "global_batch_size effective_batch_size total_batch_size",
    "training.micro_batch_size": "per_device_train_batch_size per_gpu_train_batch_size "
    "per_device_eval_batch_size eval_batch_size auto_find_batch_size",
    "training.gradient_accumulation_steps": "grad_accumulation_steps accumulate_grad_batches",
    "training.learning_rate": "lr",
    "training.lora_b_lr_ratio": "loraplus_lr_ratio",
    "training.lr_schedule": "lr_scheduler lr_scheduler_type scheduler",
    "training.warmup_ratio": "warmup_steps num_warmup_steps",
    "training.optimizer": "optim",
    "training.max_grad_norm": "clip_grad_norm gradient_clipping gradient_clip_val grad_clip",
    "training.kernels": "attn_implementation flash_attention flash_attn use_flash_attention_2 "
    "xformers_attention sdp_attention use_liger_kernel enable_liger_kernel",
    "training.deterministic": "full_determinism",
    "training.log_every": "logging_steps log_every_n_steps",
    "training.eval_every": "eval_steps eval_strategy evaluation_strategy evals_per_epoch do_eval",
    "training.early_stopping": "early_stopping_patience early_stopping_threshold",
    "training.save_every": "save_steps save_strategy saves_per_epoch",
    "training.keep_checkpoints": "save_total_limit",
    "training.report_to": "wandb_project use_wandb use_tensorboard use_mlflow wandb log_with metric_logger",
    "memory.vram": "gpu_memory_limit max_memory gpu_memory_utilization",
    "memory.weights": "device_map cpu_offload low_cpu_mem_usage offload_folder fsdp_offload_params",
    "memory.activations": "gradient_checkpointing use_gradient_checkpointing activation_checkpointing "
    "enable_activation_checkpointing enable_activation_offloading activation_offloading",
}

RECIPE_KEYS = {name: ours for ours, names in _OURS.items() for name in names.split()}
"""Name in another trainer -> `section.key` of the recipe, with `: value` where the name implies one."""


def recipe_key(name: str) -> str:
    """`; here it is section.key` for another trainer's setting, or nothing."""
    return f"; here it is {RECIPE_KEYS[name]}" if name in RECIPE_KEYS else ""
